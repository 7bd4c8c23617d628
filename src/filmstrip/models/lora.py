"""A LoRA adapter's folder in, linear layers that add it to some rows of a packed batch out; knows no model family.

The folder is PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``. The base weights stay as they are, because
other rows of the same batch are computed without the adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils.hub import cached_file

from filmstrip.errors import ModelLoadError
from filmstrip.models.checkpoint import Checkpoint

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")
"""What PEFT calls a factor; some versions put the adapter's own name before ``weight``."""
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern")
"""Settings that change what a layer computes; empty in adapters that can be added to rows."""


class AdaptedLinear(torch.nn.Module):
    """``base(x) + scaling * B(A(x))`` in the rows that :meth:`Adapter.begin` named, ``base(x)`` in the others."""

    def __init__(
        self, base: torch.nn.Linear, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, adapter: Adapter
    ) -> None:
        """``lora_a`` is (rank, in_features), ``lora_b`` (out_features, rank)."""
        super().__init__()
        self.base, self._lora_a, self._lora_b, self._scaling, self._adapter = base, lora_a, lora_b, scaling, adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, N, in_features) -> (1, N, out_features)."""
        output, rows = self.base(x), self._adapter.rows
        if rows is not None:
            added = F.linear(F.linear(x[0, rows], self._lora_a), self._lora_b) * self._scaling
            output.index_add_(1, rows, added.unsqueeze(0))
        return output


class Adapter:
    """One adapter in the layers of a model, and which rows of the pass in progress it changes."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        """int64 (n,): rows that are changed; None: no row is."""

    def begin(self, adapted: torch.Tensor | None) -> None:
        """Prepare a forward pass: bool (N,) says in which rows the adapter is on; None: in none."""
        self.rows = None if adapted is None else adapted.nonzero().flatten()


def load_adapter(checkpoint: Checkpoint, folder: str, layers: torch.nn.Module, prefix: str) -> Adapter | None:
    """Put the adapter in the ``folder`` of ``checkpoint`` into ``layers``; None if it has no such folder.

    ``prefix`` is what the layers are called in the checkpoint's module: the adapter may change linear layers in them and
    nothing else. Raises :class:`ModelLoadError` for an adapter that would be computed wrongly.
    """
    config_path = _find(checkpoint, folder, "adapter_config.json")
    if config_path is None:
        return None
    weights_path = _find(checkpoint, folder, "adapter_model.safetensors")
    if weights_path is None:
        raise ModelLoadError(
            f"{folder} of {checkpoint.model!r} has no adapter_model.safetensors; an adapter must be safetensors, because "
            "unpickling can run any code",
            param="model",
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        weights = load_file(weights_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelLoadError(f"cannot read {folder} of {checkpoint.model!r}: {error}", param="model") from error
    _check_config(config, folder)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    adapter = Adapter()
    for name, factors in _by_layer(weights, folder).items():
        base = _find_linear(layers, name.removeprefix(f"{prefix}.")) if name.startswith(f"{prefix}.") else None
        if base is None:
            raise ModelLoadError(
                f"the adapter in {folder} changes {name}; only linear layers in {prefix} are supported", param="model"
            )
        lora_a, lora_b = (factors[factor].to(checkpoint.device, checkpoint.dtype) for factor in "AB")
        shapes, wanted = (lora_a.shape, lora_b.shape), (base.in_features, base.out_features, config["r"])
        if shapes != ((wanted[2], wanted[0]), (wanted[1], wanted[2])):
            raise ModelLoadError(
                f"the adapter in {folder} has factors of {tuple(lora_a.shape)} and {tuple(lora_b.shape)} for {name}, which "
                f"takes {wanted[0]} values and gives {wanted[1]}, at rank {wanted[2]}",
                param="model",
            )
        layers.set_submodule(name.removeprefix(f"{prefix}."), AdaptedLinear(base, lora_a, lora_b, scaling, adapter))
    return adapter


def _find(checkpoint: Checkpoint, folder: str, name: str) -> Path | None:
    """A file in a folder of the checkpoint, or None."""
    try:
        path = cached_file(
            checkpoint.model,
            name,
            subfolder=folder,
            revision=checkpoint.revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {folder}/{name} of {checkpoint.model!r}: {error}", param="model") from error
    return None if path is None else Path(path)


def _check_config(config: Any, folder: str) -> None:
    """Raise :class:`ModelLoadError` unless this is plain LoRA."""
    if not isinstance(config, Mapping) or config.get("peft_type") != "LORA":
        raise ModelLoadError(f"adapter_config.json in {folder} is not that of a LoRA adapter", param="model")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ModelLoadError(f"adapter_config.json in {folder} sets {name} to {value!r}", param="model")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ModelLoadError(
                f"adapter_config.json in {folder} sets {name} to {config[name]!r}, which is not supported",
                param="model",
            )
    if config.get("bias", "none") != "none":
        raise ModelLoadError(
            f"adapter_config.json in {folder} sets bias to {config['bias']!r}; only 'none' is supported", param="model"
        )


def _by_layer(weights: Mapping[str, torch.Tensor], folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Both factors of each layer, by the layer's name in the checkpoint's module."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelLoadError(
                f"the adapter in {folder} has the weight {name}, which is not supported", param="model"
            )
        layers.setdefault(match["layer"], {})[match["factor"]] = tensor
    incomplete = sorted(name for name, factors in layers.items() if len(factors) != 2)
    if incomplete or not layers:
        what = f"only one factor for {incomplete[0]}" if incomplete else "no weights"
        raise ModelLoadError(f"the adapter in {folder} has {what}", param="model")
    return layers


def _find_linear(layers: torch.nn.Module, name: str) -> torch.nn.Linear | None:
    try:
        module = layers.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, torch.nn.Linear) else None
