"""Query, key and value of Transformers' attention modules in, attention over paged K and V out; knows no model family.

Transformers calls the function registered here under :data:`ATTENTION_NAME` for every decoder layer. The step in progress
reaches it as the keyword argument ``paged_step`` of ``language_model(...)``, which Transformers hands down untouched; there
is no global. No attention mask is built, because the name is not registered as a mask function.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from filmstrip.models.paged_attention import AttentionStep

ATTENTION_NAME = "filmstrip_paged"


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    paged_step: AttentionStep | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: (1, heads, N, head_dim) in, (1, N, heads, head_dim) out.

    Raises ValueError when called outside of a paged forward pass or with an option that is not implemented, because a
    result without it would be silently wrong.
    """
    if paged_step is None:
        raise ValueError(f"attention {ATTENTION_NAME!r} needs the keyword argument paged_step")
    if attention_mask is not None:
        raise ValueError(f"attention {ATTENTION_NAME!r} is causal per request and takes no mask")
    for name in ("softcap", "position_bias", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"attention {ATTENTION_NAME!r} does not implement {name}")
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    output = paged_step.attend(
        layer_index,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
        options.get("sliding_window"),
        options.get("attention_chunk_size"),
    )
    return output.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
