"""Tests of the models: attention over pages, encoding, forward passes, loading."""
