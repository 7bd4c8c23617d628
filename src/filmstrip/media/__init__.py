"""Media: from an address to pixels; knows time and files, not models."""
