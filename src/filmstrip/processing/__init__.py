"""Processing: from messages and pixels to tokens, positions and placeholders; knows no weights."""
