"""What tests need to make tiny Qwen3-VL checkpoints; the builder itself lives with the demo, which uses it too."""

from __future__ import annotations

from filmstrip.demo.checkpoint import build_config, build_tokenizer, make_qwen3_vl

__all__ = ["build_config", "build_tokenizer", "make_qwen3_vl"]
