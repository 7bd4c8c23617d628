"""Transformers' own answer to cases for GLM-V: ``python glm_v_reference.py FOLDER``, as ``reference.py`` beside it.

Where ``FOLDER`` holds ``lengths.npy``, what the video processors choose of clips so long goes to ``lengths.out.npz``.

In these families images and videos have the same token, and Transformers' models refuse prompts that have both: they look
for media by token. Its processor does tell them apart (``mm_token_type_ids``), so here the models are told what it says.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import run_case
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor
from transformers.video_utils import VideoMetadata


class RecordingProcessor:
    """A processor that remembers which tokens of the last prompt are images (1) and videos (2)."""

    def __init__(self, processor: Any) -> None:
        self._processor, self._types = processor, torch.zeros(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **arguments: Any) -> Any:
        """As the processor."""
        inputs = self._processor(**{name: v for name, v in arguments.items() if name != "cap_pixels_per_frame"})
        self._types = inputs["mm_token_type_ids"]
        return inputs

    def masks(self, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        """Instead of a model's ``get_placeholder_mask``: bool (1, num_tokens, 1) for images and for videos."""
        return tuple((self._types == kind).unsqueeze(-1) for kind in (1, 2))


def chosen_frames(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """What both video processors choose of clips of (frames, rate), end to end, and how many of each."""
    chosen = {}
    for name, sampler in (("glm4v", Glm4vVideoProcessor()), ("glm46v", Glm46VVideoProcessor())):
        found = [
            sampler.sample_frames(VideoMetadata(total_num_frames=int(total), fps=fps, duration=total / fps))
            for total, fps in lengths.tolist()
        ]
        chosen |= {name: np.concatenate(found), f"{name}_lens": np.array([len(frames) for frames in found])}
    return chosen


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    if (folder / "lengths.npy").exists():
        np.savez(folder / "lengths.out.npz", **chosen_frames(np.load(folder / "lengths.npy")))
    cases = json.loads((folder / "cases.json").read_text())
    for checkpoint in dict.fromkeys(case["checkpoint"] for case in cases):
        processor = RecordingProcessor(AutoProcessor.from_pretrained(checkpoint))
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = None  # every case gives its full number of tokens
        model.model.get_placeholder_mask = processor.masks
        for case in cases:
            if case["checkpoint"] == checkpoint:
                with np.load(folder / f"{case['name']}.npz") as arrays:
                    np.savez(folder / f"{case['name']}.out.npz", **run_case(case, arrays, processor, model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
