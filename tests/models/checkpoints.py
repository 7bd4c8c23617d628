"""Tiny Qwen3-VL checkpoints for tests, made once in a test session for each set of arguments."""

from __future__ import annotations

from filmstrip.demo.checkpoint import build_config, build_tokenizer, make_qwen3_vl

__all__ = ["build_config", "build_tokenizer", "make_qwen3_vl"]
