"""Every decoder against every kind of file."""
