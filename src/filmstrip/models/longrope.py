"""Positions of packed rows in, LongRoPE's cosines and sines out, for short and long requests side by side; knows no family.

Transformers chooses one set of frequencies for a whole forward pass, by the longest position in it; here each request has
its own, whoever it shares the pass with.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class LongRope(torch.nn.Module):
    """Stands in for a Transformers rotary embedding of the type ``longrope``.

    A request of more than ``original_max_position_embeddings`` tokens has long factors from its first token on, others
    have short ones.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        """``config`` is the text model's; its ``rope_parameters`` hold both lists of factors."""
        super().__init__()
        self.original_max_position_embeddings = int(config.rope_parameters["original_max_position_embeddings"])
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        short, self._attention_scaling = compute(config, device)
        long, _ = compute(config, device, seq_len=self.original_max_position_embeddings + 1)
        self._short, self._long = short.to(device, torch.float32), long.to(device, torch.float32)
        self._long_rows: torch.Tensor | None = None

    def begin(self, long_rows: torch.Tensor | None) -> None:
        """Prepare a forward pass: bool (N,) says which rows belong to long requests; None: no row does."""
        self._long_rows = long_rows

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (1, N, rotary_dim) in the dtype of ``x`` for ``position_ids`` (1, N)."""
        positions = position_ids[..., None].float()
        angles = positions * self._short
        if self._long_rows is not None:
            angles = torch.where(self._long_rows[:, None], positions * self._long, angles)
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos() * self._attention_scaling, angles.sin() * self._attention_scaling
        return cosines.to(x.dtype), sines.to(x.dtype)
