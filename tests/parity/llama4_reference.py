"""What Transformers' image processor for Llama 4 does with sizes and colours: ``python llama4_reference.py FOLDER``.

It runs in a process of its own, as ``reference.py`` beside it. ``FOLDER`` holds ``sizes.npz`` with image shapes ``sizes``
(N, 2), numbers of tiles ``max_patches`` (N,) and ``enlarge`` (N,); ``sizes.out.npz`` gets for each the canvas and the size
of the image on it, and the 256 values of a channel as they are normalised with ``mean`` and ``std``.
"""

import sys
from pathlib import Path

import numpy as np
import reference  # noqa: F401 - makes torchvision importable
import torch
from transformers.models.llama4 import image_processing_llama4


class Known(Exception):
    """Ends a processor's work where sizes are known."""


class SizesOnly(image_processing_llama4.Llama4ImageProcessor):
    """Notes the size to which an image would be resized."""

    def resize(self, image, size, **kwargs):
        self.fitted = (int(size.height), int(size.width))
        return image


def refuse_to_pad(_images, canvas):
    raise Known(tuple(map(int, canvas)))


def main(folder: Path) -> None:
    image_processing_llama4.pad_to_best_fit = refuse_to_pad
    processor, canvases, fitted = SizesOnly(size={"height": 56, "width": 56}), [], []
    with np.load(folder / "sizes.npz") as arrays:
        inputs = dict(arrays)
    for (height, width), most, enlarge in zip(inputs["sizes"], inputs["max_patches"], inputs["enlarge"], strict=True):
        image = torch.zeros(1, dtype=torch.uint8).expand(3, int(height), int(width))
        try:
            processor.preprocess(
                [image], max_patches=int(most), resize_to_max_canvas=bool(enlarge), disable_grouping=True
            )
        except Known as known:
            canvases.append(known.args[0])
            fitted.append(processor.fitted)
    colours = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    mean, std = inputs["mean"].tolist(), inputs["std"].tolist()
    normalised = processor.rescale_and_normalize(colours, True, 1 / 255, True, mean, std)
    np.savez(folder / "sizes.out.npz", canvases=canvases, fitted=fitted, normalised=normalised.float().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
