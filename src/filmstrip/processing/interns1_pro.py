"""Intern-S1-Pro: which frames, what size, which words; knows no weights.

Pictures and videos are shown as Qwen3-VL shows them, but a prompt's positions have one axis: the token's index.
"""

from __future__ import annotations

from filmstrip.processing.placeholders import Assembled
from filmstrip.processing.qwen3_vl import Qwen3VLProcessor


class InternS1ProProcessor(Qwen3VLProcessor):
    """Implements :class:`filmstrip.processing.base.Processor`."""

    def positions(self, assembled: Assembled) -> tuple[None, int]:  # noqa: ARG002 - the protocol's
        """One position a token, which the engine counts itself."""
        return None, 0
