"""Attacks on a running server through its media, case by case; every refusal is checked by the same few rules."""
