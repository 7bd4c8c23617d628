"""Transformers' own answer to cases for Molmo 2: ``python molmo2_reference.py FOLDER``, as ``tile_reference.py`` beside it.

Where ``FOLDER`` holds ``sizes.npy`` and ``lengths.npy``, how the processors cut images of such sizes and what they choose of
clips so long goes to ``arithmetic.out.npz``.

Transformers refuses prompts with two videos and prompts with images beside a video, for which its code has all it takes.
Here its processor is not asked to refuse, and its model is given the features of both in the order of the prompt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tile_reference import run_case
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.molmo2.image_processing_molmo2 import compute_crop_geometry
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import VideoMetadata


class ToldModel:
    """A model that is told how images and videos follow each other in the prompt."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.kinds: list[str] = []

    @torch.inference_mode()
    def generate(self, **arguments: Any) -> Any:
        """As the model's."""
        if "pixel_values" not in arguments or "pixel_values_videos" not in arguments:
            return self._model.generate(**arguments)
        inner = self._model.model
        names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        videos = iter(inner.get_video_features(*(arguments.pop(name) for name in names)).pooler_output)
        names = ("pixel_values", "image_token_pooling", "image_grids")
        images = iter(inner.get_image_features(*(arguments.pop(name) for name in names)).pooler_output)
        features = tuple(next(images if kind == "image" else videos) for kind in self.kinds)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return self._model.generate(**arguments, mm_encoder_outputs=encoded)


def arithmetic(sizes: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Crops and canvas for (height, width, most crops, left, right, size in patches); frames of (total, rate, number)."""
    geometry = [
        compute_crop_geometry(height, width, most, [left, right], 14 * side, 14)
        for height, width, most, left, right, side in sizes.tolist()
    ]
    sampler = Molmo2VideoProcessor()
    frames = []
    for total, fps, number in lengths.tolist():
        metadata = VideoMetadata(total_num_frames=int(total), fps=fps, duration=total / fps)
        frames.append(sampler.sample_frames(metadata, num_frames=int(number)).numpy())
    lens = np.array([len(chosen) for chosen in frames])
    return {"geometry": np.array(geometry), "frames": np.concatenate(frames), "lens": lens}


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    Molmo2Processor.validate_inputs = ProcessorMixin.validate_inputs
    if (folder / "sizes.npy").exists():
        sizes, lengths = np.load(folder / "sizes.npy"), np.load(folder / "lengths.npy")
        np.savez(folder / "arithmetic.out.npz", **arithmetic(sizes, lengths))
    cases = json.loads((folder / "cases.json").read_text())
    for checkpoint in dict.fromkeys(case["checkpoint"] for case in cases):
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = None  # every case gives its full number of tokens
        told = ToldModel(model)
        for case in cases:
            if case["checkpoint"] == checkpoint:
                told.kinds = [item["type"] for item in case["media"]]
                with np.load(folder / f"{case['name']}.npz") as arrays:
                    np.savez(folder / f"{case['name']}.out.npz", **run_case(case, arrays, processor, told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
