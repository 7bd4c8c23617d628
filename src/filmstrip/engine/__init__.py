"""Engine: requests in, tokens out; knows blocks, not media files or HTTP."""
