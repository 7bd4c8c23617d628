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
    """Antialiased resize of a uint8 (H, W, 3) frame; uint8 (height, width, 3).

    PyTorch's fixed-point kernel on channels-last uint8 is the one that torchvision's ``resize`` runs on CPU, so the result
    is bit-equal to the reference processors'. The kernel is single-threaded per image and releases the GIL.
    """
    frame = torch.from_numpy(np.require(rgb, requirements=["C", "W"]))  # torch takes no read-only array
    if rgb.shape[:2] == (height, width):
        return frame
    channels_first = frame.permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(channels_first, (height, width), mode=resample, antialias=True, align_corners=False)
    return resized.squeeze(0).permute(1, 2, 0)


def draw_view(rgb: np.ndarray, view: View, resample: Resample) -> np.ndarray:
    """What ``view`` shows of a uint8 (H, W, 3) frame (or of a view before it): uint8 (view.height, view.width, 3)."""
    resized = resize_frame(rgb, view.resized_height, view.resized_width, resample).numpy()
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
        for view, target in self._targets:
            tile_rows, tile_columns, rows, columns = target.shape[1:5]
            shape = (tile_rows, rows, merge, size, tile_columns, columns, merge, size, 3)
            canvas = draw_view(canvas if view.of_previous else rgb, view, plan.resample)
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
