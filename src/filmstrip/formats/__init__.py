"""Checkpoints laid out otherwise than Transformers does: their small files translated to its own; knows no weights."""
