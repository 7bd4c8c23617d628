"""Filmstrip: a multimodal LLM server with video as a native input."""
