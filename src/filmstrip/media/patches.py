"""RGB frames to uint8 patch rows in a model's layout: resize, cut, write in place; knows no files and no model.

Pixels stay uint8: normalising is one table look-up away and belongs to the model, and a quarter of the bytes goes through
shared memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import FramePlan, Resample, View


def resize_frame(rgb: np.ndarray, height: int, width: int, resample: Resample = "bicubic") -> torch.Tensor:
    """Resize of a uint8 (H, W, 3) frame; uint8 (height, width, 3).

    PyTorch's fixed-point kernel on channels-last uint8 is the one that torchvision's ``resize`` runs on CPU, so the result
    is bit-equal to the reference processors'. The kernel is single-threaded per image and releases the GIL.
    """
    frame = torch.from_numpy(np.require(rgb, requirements=["C", "W"]))  # torch takes no read-only array
    if rgb.shape[:2] == (height, width):
        return frame
    if resample == "bilinear_plain":
        return torch.from_numpy(_resize_plain(rgb, height, width))
    channels_first = frame.permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(channels_first, (height, width), mode=resample, antialias=True, align_corners=False)
    return resized.squeeze(0).permute(1, 2, 0)


def _resize_plain(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear without antialiasing, computed in float32 and rounded: uint8 (height, width, 3).

    The reference resizes floats, by a kernel of PyTorch's that rounds elsewhere where there is but one thread, as there is
    here. These are the steps of the other one, which is taken for sizes of more than 128 rows and columns together.
    """
    top, bottom, above, below = _neighbours(rgb.shape[0], height)
    left, right, before, behind = _neighbours(rgb.shape[1], width)
    rows, place = np.unique(np.concatenate([top, bottom]), return_inverse=True)
    pixels = rgb[rows].astype(np.float32)
    across = _fused(pixels[:, left], before[:, None], pixels[:, right] * behind[:, None])
    upper, lower = across[place[:height]], across[place[height:]]
    values = _fused(upper, above[:, None, None], lower * below[:, None, None])
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _neighbours(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Between which two of ``size`` pixels each of ``new_size`` lies, and what they weigh in it, float32."""
    scale = np.float64(np.float32(size) / np.float32(new_size))
    places = np.maximum((scale * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(places.astype(np.int64), size - 1)
    weight = (places - first.astype(np.float32)).clip(0, 1)
    return first, np.minimum(first + 1, size - 1), np.float32(1) - weight, weight


def _fused(factor: np.ndarray, other: np.ndarray, term: np.ndarray) -> np.ndarray:
    """``factor * other + term`` of float32, rounded once."""
    product = np.multiply(factor, other, dtype=np.float64)
    product += term
    return product.astype(np.float32)


def draw_view(rgb: np.ndarray, view: View, resample: Resample) -> np.ndarray:
    """What ``view`` shows of a uint8 (H, W, 3) frame (or of a view before it): uint8 (view.height, view.width, 3)."""
    return _lay(_resized(rgb, view, resample), view)


def _resized(rgb: np.ndarray, view: View, resample: Resample) -> np.ndarray:
    """The frame at the size that it has on the canvas of ``view``."""
    if view.square_color is not None:
        rgb = _pad_to_square(rgb, view.square_color)
    return resize_frame(rgb, view.resized_height, view.resized_width, resample).numpy()


def _lay(resized: np.ndarray, view: View) -> np.ndarray:
    """The canvas of ``view`` with a frame of its resized size on it."""
    if resized.shape[:2] == (view.height, view.width) and (view.top, view.left) == (0, 0):
        return resized
    canvas = np.full((view.height, view.width, 3), view.fill, np.uint8)
    rows, columns = (
        slice(min(max(start, 0), size), min(max(start + length, 0), size))
        for start, size, length in (
            (view.top, view.height, view.resized_height),
            (view.left, view.width, view.resized_width),
        )
    )
    canvas[rows, columns] = resized[
        rows.start - view.top : rows.stop - view.top, columns.start - view.left : columns.stop - view.left
    ]
    return canvas


def _pad_to_square(rgb: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """A uint8 (H, W, 3) frame between bars of ``color``, one pixel more at the end of an odd rest: uint8 (side, side, 3)."""
    height, width, _ = rgb.shape
    side = max(height, width)
    if height == width:
        return rgb
    square = np.full((side, side, 3), color, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgb
    return square


class PatchWriter:
    """Writes the frames of a :class:`FramePlan` into its patch matrix, each once, from any thread.

    The layout is the reference's (``Qwen3VLVideoProcessor.patchify``): rows run over temporal group, merge block row and
    column, row and column inside the block; columns over channel, frame in the group, patch row, patch column. Several views
    of a frame follow each other inside its group, and so do the tiles of a view.
    """

    def __init__(self, plan: FramePlan, output: torch.Tensor) -> None:
        """``output`` is uint8 of ``plan.patches_shape``."""
        self._plan = plan
        layout = plan.layout
        size, merge, group = layout.patch_size, layout.merge_size, layout.temporal_patch_size
        groups = output.view(-1, plan.patches_per_frame, 3, group, size, size)
        self._targets: list[tuple[View, np.ndarray]] = []
        first = 0
        for view in plan.frame_views:
            rows, columns = view.height // size, view.width // size
            part = groups[:, first : first + rows * columns]
            tile_rows, tile_columns = view.tiles or (1, 1)
            tile_blocks = (rows // tile_rows // merge, columns // tile_columns // merge)
            blocks = part.unflatten(1, (tile_rows, tile_columns, *tile_blocks, merge, merge))
            self._targets.append((view, blocks.numpy()))
            first += rows * columns

    def write(self, position: int, rgb: np.ndarray) -> None:
        """Resize and write frame number ``position`` of the plan; the last one also fills its group's missing frames."""
        plan, layout = self._plan, self._plan.layout
        size, merge = layout.patch_size, layout.merge_size
        group, slot = divmod(position, layout.temporal_patch_size)
        is_last = position == len(plan.frame_indices) - 1
        canvas = rgb
        resized: dict[tuple, np.ndarray] = {}  # crops of one canvas share it
        for view, target in self._targets:
            tile_rows, tile_columns, rows, columns = target.shape[1:5]
            shape = (tile_rows, rows, merge, size, tile_columns, columns, merge, size, 3)
            if view.of_previous:
                canvas = draw_view(canvas, view, plan.resample)
            else:
                key = (view.resized_height, view.resized_width, view.square_color)
                if key not in resized:
                    resized[key] = _resized(rgb, view, plan.resample)
                canvas = _lay(resized[key], view)
            patches = canvas.reshape(shape).transpose(0, 4, 1, 5, 2, 6, 8, 3, 7)
            for each in range(slot, layout.temporal_patch_size if is_last else slot + 1):
                # NumPy's copy: PyTorch's would start a team of threads in each thread that calls it, and can be kept from
                # that for the whole process only.
                np.copyto(target[group, ..., each, :, :], patches)


def write_patches(
    frame: Callable[[int], np.ndarray], plan: FramePlan, num_threads: int, cancel: threading.Event | None = None
) -> SharedTensor:
    """Patches of ``plan`` from frames that can be had by index in any order; ``frame`` runs in ``num_threads`` threads.

    Raises what ``frame`` raises, and InterruptedError once ``cancel`` is set.
    """
    output = SharedTensor.create(plan.patches_shape)
    writer = PatchWriter(plan, output.torch())

    def write(position: int) -> None:
        if cancel is not None and cancel.is_set():
            raise InterruptedError("reading was cancelled")
        writer.write(position, frame(plan.frame_indices[position]))

    with ThreadPoolExecutor(num_threads) as threads:
        for _ in threads.map(write, range(len(plan.frame_indices))):
            pass
    return output
