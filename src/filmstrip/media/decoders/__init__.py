"""Video decoders behind one small protocol."""
