"""Tests of the command line, against a model that is a script."""
