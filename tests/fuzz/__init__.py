"""Fuzzing of the media path: seeds, seeded mutations and a runner; knows the loader's public steps and no decoder."""
