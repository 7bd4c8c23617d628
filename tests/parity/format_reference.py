"""Transformers' own answer to cases for twins of checkpoints in other formats: ``python format_reference.py FOLDER``.

As ``tile_reference.py`` beside it; a projector that Transformers does not have is put in from a file of the twin's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tile_reference import run_case
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor


def read_projector(weights: dict[str, torch.Tensor]) -> nn.Module:
    """One linear layer, or Yi-VL's: two, each with a norm behind it, and GELU between."""
    if "weight" in weights:
        module: nn.Module = nn.Linear(*reversed(weights["weight"].shape))
    else:
        features, hidden = reversed(weights["0.weight"].shape)
        module = nn.Sequential(
            nn.Linear(features, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
        )
    module.load_state_dict(weights)
    return module


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    cases = json.loads((folder / "cases.json").read_text())
    for checkpoint in dict.fromkeys(case["checkpoint"] for case in cases):
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = None  # every case gives its full number of tokens
        projector = Path(checkpoint) / "projector.safetensors"
        if projector.is_file():
            model.model.multi_modal_projector = read_projector(load_file(projector))
        for case in cases:
            if case["checkpoint"] == checkpoint:
                with np.load(folder / f"{case['name']}.npz") as arrays:
                    np.savez(folder / f"{case['name']}.out.npz", **run_case(case, arrays, processor, model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
