"""Server: the OpenAI-compatible HTTP API; knows HTTP and nothing below :mod:`filmstrip.llm`."""
