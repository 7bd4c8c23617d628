"""Patches against the formula, element by element, for every patch, merge and group size; and whoever writes them."""

import itertools
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from filmstrip.media.patches import PatchWriter, resize_frame, write_patches
from filmstrip.types import FramePlan, PatchLayout


def element(frames, plan, row, column):
    """The pixel that belongs at (row, column) of the patch matrix, by division alone."""
    layout = plan.layout
    size, merge, group = layout.patch_size, layout.merge_size, layout.temporal_patch_size
    _, grid_height, grid_width = plan.grid_thw
    row, inner_column = divmod(row, merge)
    row, inner_row = divmod(row, merge)
    row, block_column = divmod(row, grid_width // merge)
    frame_group, block_row = divmod(row, grid_height // merge)
    column, x = divmod(column, size)
    column, y = divmod(column, size)
    channel, slot = divmod(column, group)
    frame = min(frame_group * group + slot, len(frames) - 1)  # the last frame fills its group
    y += (block_row * merge + inner_row) * size
    x += (block_column * merge + inner_column) * size
    return int(frames[frame][y, x, channel])


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 14, 16])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_every_pixel_has_its_place(size, group, merge, num_frames):
    factor = size * merge
    plan = FramePlan(tuple(range(num_frames)), 2 * factor, 3 * factor, PatchLayout(size, group, merge))
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (plan.height, plan.width, 3), np.uint8) for _ in range(num_frames)]
    patches = write_patches(lambda index: frames[index], plan, 2).array
    assert patches.shape == plan.patches_shape
    places = {(int(rng.integers(patches.shape[0])), int(rng.integers(patches.shape[1]))) for _ in range(300)}
    corners = itertools.product((0, patches.shape[0] - 1), (0, patches.shape[1] - 1))
    for row, column in {*places, *corners}:
        assert patches[row, column] == element(frames, plan, row, column), (row, column)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (224, 160)])
@pytest.mark.parametrize("source", [(30, 33), (97, 161), (480, 270), (64, 96)])
def test_resized_pixels_are_those_of_interpolate(source, height, width):
    plan = FramePlan((0,), height, width, PatchLayout(16, 1, 1))
    frame = np.random.default_rng(1).integers(0, 256, (*source, 3), np.uint8)
    channels_last = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(channels_last, (height, width), mode="bicubic", antialias=True, align_corners=False)
    expected = channels_last if source == (height, width) else resized
    blocks = expected[0].view(3, height // 16, 16, width // 16, 16).permute(1, 3, 0, 2, 4)
    assert torch.equal(write_patches(lambda _: frame, plan, 1).torch(), blocks.reshape(plan.patches_shape))


def test_views_and_read_only_frames_are_taken():
    base = np.random.default_rng(2).integers(0, 256, (40, 60, 3), np.uint8)
    turned, locked = np.rot90(base), base.copy()
    locked.flags.writeable = False
    assert torch.equal(resize_frame(turned, 32, 32), resize_frame(turned.copy(), 32, 32))
    assert torch.equal(resize_frame(locked, 32, 32), resize_frame(base, 32, 32))


def test_each_frame_touches_only_its_own_place():
    plan = FramePlan(tuple(range(6)), 32, 64, PatchLayout(16, 2, 2))
    output = torch.full(plan.patches_shape, 7, dtype=torch.uint8)
    PatchWriter(plan, output).write(3, np.zeros((32, 64, 3), np.uint8))
    written = output.view(3, 2 * 4, 3, 2, 16, 16) == 0
    assert written[1, :, :, 1].all()
    assert int(written.sum()) == 32 * 64 * 3


def test_cancelling_stops_writing():
    cancel = threading.Event()
    plan = FramePlan(tuple(range(500)), 32, 32, PatchLayout(16, 2, 2))
    calls = []

    def frame(index):
        calls.append(index)
        cancel.set()
        return np.zeros((32, 32, 3), np.uint8)

    with pytest.raises(InterruptedError):
        write_patches(frame, plan, 2, cancel)
    assert len(calls) <= 2
