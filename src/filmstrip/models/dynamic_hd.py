"""A picture's size in, its crops out: the grid of "dynamic HD" and which of its patches show the picture; knows no pixels.

The picture is resized to fit a canvas of ``rows`` x ``columns`` square crops and lies in its upper left corner. Both the
processor, which counts tokens, and the model, which masks the padding, ask here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CropGrid:
    """The crops of one picture: ``rows`` x ``columns`` of ``crop_size`` pixels, cut into patches of ``patch_size``."""

    rows: int
    columns: int
    crop_size: int
    patch_size: int

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.rows * self.crop_size, self.columns * self.crop_size

    @property
    def patches_per_side(self) -> int:
        """Patches along the side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def features_per_side(self) -> int:
        """Features along the side of a crop: one for each two patches, an odd one for itself."""
        return -(-self.patches_per_side // 2)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture of this size when it is resized to fit the canvas, its shape kept."""
        canvas_height, canvas_width = self.canvas_size
        scale_height, scale_width = canvas_height / height, canvas_width / width
        if scale_width < scale_height:
            return int(height * scale_width), canvas_width
        return canvas_height, int(width * scale_height)

    def shown_patches(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the canvas's patches that show some of a picture of this size; the others are padding."""
        sides = zip(self.canvas_size, self.resized_size(height, width), (self.rows, self.columns), strict=True)
        rows, columns = (
            self.patches_per_side * num_crops - (canvas - resized) // self.patch_size
            for canvas, resized, num_crops in sides
        )
        return rows, columns

    def shown_features(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the canvas's features of which the first patch is no padding."""
        counts = (divmod(patches, self.patches_per_side) for patches in self.shown_patches(height, width))
        rows, columns = (crops * self.features_per_side + -(-rest // 2) for crops, rest in counts)
        return rows, columns

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture of this size: its features and the whole once more as one crop, each line with an end, and
        a token between the two."""
        rows, columns = self.shown_features(height, width)
        side = self.features_per_side
        return rows * (columns + 1) + 1 + side * (side + 1)


def choose_grid(height: int, width: int, crop_size: int, patch_size: int, max_crops: int) -> CropGrid:
    """As many crops as cover a picture of this size; where those are more than ``max_crops``, a grid of about its shape."""
    rows, columns = math.ceil(height / crop_size), math.ceil(width / crop_size)
    if rows * columns > max_crops:
        rows, columns = _nearest_shape(height, width, crop_size, max_crops)
    return CropGrid(rows, columns, crop_size, patch_size)


def _nearest_shape(height: int, width: int, crop_size: int, max_crops: int) -> tuple[int, int]:
    """(rows, columns) of the shape nearest to the picture's.

    Of grids of the same shape a larger one is taken only for a picture of more than half its pixels.
    """
    best, nearest = (1, 1), math.inf
    for rows, columns in _shapes(max_crops):
        distance = abs(width / height - columns / rows)
        is_filled = height * width > 0.5 * crop_size**2 * rows * columns
        if distance < nearest or (distance == nearest and is_filled):
            best, nearest = (rows, columns), distance
    return best


@functools.cache
def _shapes(max_crops: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns) of at most ``max_crops``, those of fewer crops first."""
    shapes = [(rows, columns) for rows in range(1, max_crops + 1) for columns in range(1, max_crops // rows + 1)]
    return tuple(sorted(shapes, key=math.prod))
