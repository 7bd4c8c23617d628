"""Command line: `filmstrip serve` and `filmstrip chat`."""
