"""Tests of the HTTP server, against a model that is a script."""
