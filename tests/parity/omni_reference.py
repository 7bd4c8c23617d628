"""Transformers' own answer to cases for Qwen3-Omni's thinker: ``python omni_reference.py FOLDER``, as ``reference.py``.

Where frames were chosen beforehand, its processor must be told their rate; it would take 1 a second. Its model asks for
positions in other words than its siblings.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import run_case
from transformers import AutoProcessor, Qwen3OmniMoeThinkerForConditionalGeneration


class TellingProcessor:
    """A processor that is told the rate of chosen frames, and remembers what it says of the last prompt."""

    def __init__(self, processor: Any) -> None:
        self._processor, self.inputs = processor, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **arguments: Any) -> Any:
        """As the processor."""
        if arguments.get("do_sample_frames") is False:
            rates = {len(one.frames_indices) * one.fps / one.total_num_frames for one in arguments["video_metadata"]}
            (arguments["fps"],) = rates  # it takes one for all
        self.inputs = self._processor(**arguments)
        return self.inputs


def positions(model: Any, processor: TellingProcessor, input_ids: torch.Tensor, _: Any, **grids: Any) -> Any:
    """Of the last prompt, asked for as of the family's siblings: (3, 1, num_tokens) and the delta."""
    seconds, mask = processor.inputs.get("video_second_per_grid"), torch.ones_like(input_ids)
    return model.get_rope_index(input_ids, attention_mask=mask, second_per_grids=seconds, **grids)


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    cases = json.loads((folder / "cases.json").read_text())
    for checkpoint in dict.fromkeys(case["checkpoint"] for case in cases):
        processor = TellingProcessor(AutoProcessor.from_pretrained(checkpoint))
        model: Any = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = None  # every case gives its full number of tokens
        model.model.get_rope_index = partial(positions, model, processor)
        for case in cases:
            if case["checkpoint"] == checkpoint:
                with np.load(folder / f"{case['name']}.npz") as arrays:
                    np.savez(folder / f"{case['name']}.out.npz", **run_case(case, arrays, processor, model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
