"""Patches lie where the reference and its formula put them, for every size, whoever writes first; and their pixels."""

import itertools
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from filmstrip.media.patches import PatchWriter, draw_view, resize_frame, write_patches
from filmstrip.types import FramePlan, PatchLayout, View


def reference(frames, plan):
    """``patchify`` of the reference processor: uint8 (T, C, H, W), padded by the last frame, viewed and permuted."""
    size, group, merge = plan.layout.patch_size, plan.layout.temporal_patch_size, plan.layout.merge_size
    video = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames])
    video = torch.cat([video, video[-1:].expand(-len(video) % group, -1, -1, -1)])
    t, h, w = len(video) // group, plan.height // size, plan.width // size
    view = video.view(t, group, 3, h // merge, merge, size, w // merge, merge, size)
    return view.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * group * size * size)


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
@pytest.mark.parametrize("size", [2, 4, 8, 14, 16])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7])
def test_every_pixel_has_its_place(size, group, merge, num_frames):
    factor = size * merge
    plan = FramePlan(tuple(range(num_frames)), 2 * factor, 3 * factor, PatchLayout(size, group, merge))
    rng = np.random.default_rng(num_frames)
    frames = [rng.integers(0, 256, (plan.height, plan.width, 3), np.uint8) for _ in range(num_frames)]
    patches = write_patches(lambda index: frames[index], plan, 2)
    assert patches.array.shape == plan.patches_shape
    assert torch.equal(patches.torch(), reference(frames, plan))
    num_rows, num_columns = plan.patches_shape
    places = {(int(rng.integers(num_rows)), int(rng.integers(num_columns))) for _ in range(100)}
    for row, column in {*places, *itertools.product((0, num_rows - 1), (0, num_columns - 1))}:
        assert patches.array[row, column] == element(frames, plan, row, column), (row, column)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (224, 160)])
@pytest.mark.parametrize("source", [(30, 33), (50, 70), (64, 96), (97, 161), (200, 31), (480, 270), (37, 640), (1, 1)])
def test_resized_pixels_are_those_of_interpolate(source, height, width):
    """PyTorch's own bicubic on unsigned bytes, which gives the same for both memory formats."""
    plan = FramePlan((0,), height, width, PatchLayout(16, 1, 1))
    frame = np.random.default_rng(1).integers(0, 256, (*source, 3), np.uint8)
    batch = torch.from_numpy(frame).permute(2, 0, 1)[None]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = batch.contiguous(memory_format=memory_format)
        resized = F.interpolate(given, (height, width), mode="bicubic", antialias=True, align_corners=False)
        expected = given if source == (height, width) else resized
        assert torch.equal(resize_frame(frame, height, width), expected[0].permute(1, 2, 0))
        blocks = expected[0].reshape(3, height // 16, 16, width // 16, 16).permute(1, 3, 0, 2, 4)
        assert torch.equal(write_patches(lambda _: frame, plan, 1).torch(), blocks.reshape(plan.patches_shape))


def test_views_and_read_only_frames_are_taken():
    base = np.random.default_rng(2).integers(0, 256, (40, 60, 3), np.uint8)
    turned, locked = np.rot90(base), base.copy()
    locked.flags.writeable = False
    assert torch.equal(resize_frame(turned, 32, 32), resize_frame(turned.copy(), 32, 32))
    assert torch.equal(resize_frame(locked, 32, 32), resize_frame(base, 32, 32))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (3, 5), (-4, 2), (6, -7), (-9, -30), (20, 0), (0, -31)])
@pytest.mark.parametrize("fill", [0, 255])
def test_a_view_is_a_frame_laid_on_a_canvas(top, left, fill):
    frame = np.random.default_rng(3).integers(0, 256, (50, 40, 3), np.uint8)
    view = View(16, 24, 20, 31, top, left, fill)
    resized = resize_frame(frame, 20, 31, "bilinear").numpy()
    expected = np.empty((16, 24, 3), np.uint8)
    for y, x in itertools.product(range(16), range(24)):
        inside = 0 <= y - top < 20 and 0 <= x - left < 31
        expected[y, x] = resized[y - top, x - left] if inside else fill
    np.testing.assert_array_equal(draw_view(frame, view, "bilinear"), expected)


def test_a_view_may_be_made_from_the_one_before():
    """A frame on a coloured square, and that square made small: as if the square were the frame."""
    large = View(32, 32, 20, 32, 6, 0, (120, 7, 255))
    small = View(8, 8, 8, 8, of_previous=True)
    frame = np.random.default_rng(5).integers(0, 256, (50, 80, 3), np.uint8)
    canvas = draw_view(frame, large, "bicubic")
    assert (canvas[:6] == large.fill).all()
    assert (canvas[26:] == large.fill).all()
    np.testing.assert_array_equal(canvas[6:26], resize_frame(frame, 20, 32).numpy())
    plan = FramePlan((0,), 32, 32, PatchLayout(8, 1, 1), (large, small, View(8, 8, 8, 8)), num_embeddings=4)
    patches = write_patches(lambda _: frame, plan, 1).array.reshape(-1, 3, 8, 8).transpose(0, 2, 3, 1)
    assert len(patches) == 4 * 4 + 1 + 1
    np.testing.assert_array_equal(patches[5], canvas[8:16, 8:16])
    np.testing.assert_array_equal(patches[16], resize_frame(canvas, 8, 8).numpy())
    np.testing.assert_array_equal(patches[17], resize_frame(frame, 8, 8).numpy())


@pytest.mark.parametrize("source", [(30, 33), (97, 161), (200, 31), (1, 1), (20, 31)])
def test_plain_bilinear_is_rounded_from_floats(source):
    """As PyTorch computes it with several threads; with one it rounds elsewhere."""
    frame = np.random.default_rng(6).integers(0, 256, (*source, 3), np.uint8)
    values = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    num_threads = torch.get_num_threads()
    for height, width in ((70, 70), (154, 112), (378, 378), (97, 161)):
        torch.set_num_threads(2)
        try:
            resized = F.interpolate(values, (height, width), mode="bilinear", antialias=False)
        finally:
            torch.set_num_threads(num_threads)
        expected = resized.round().to(torch.uint8)[0].permute(1, 2, 0)
        assert torch.equal(resize_frame(frame, height, width, "bilinear_plain"), expected)


def test_crops_of_one_canvas_resize_a_frame_once(monkeypatch):
    sizes = []

    def counted(rgb, height, width, resample):
        sizes.append((height, width))
        return resize_frame(rgb, height, width, resample)

    monkeypatch.setattr("filmstrip.media.patches.resize_frame", counted)
    views = (View(8, 8, 8, 8), View(8, 8, 8, 12), View(8, 8, 8, 12, left=-4))
    plan = FramePlan((0,), 8, 12, PatchLayout(4, 1, 1), views, "bilinear_plain", 12)
    frame = np.random.default_rng(7).integers(0, 256, (30, 44, 3), np.uint8)
    rows = write_patches(lambda _: frame, plan, 1).array.reshape(3, 2, 2, 3, 4, 4)
    assert sizes == [(8, 8), (8, 12)]
    np.testing.assert_array_equal(rows[1, :, 1], rows[2, :, 0])


def test_views_of_a_frame_follow_each_other():
    views = (View(16, 24, 16, 24), View(8, 8, 8, 8), View(16, 8, 10, 8, 3))
    plan = FramePlan((0, 1, 2), 16, 24, PatchLayout(8, 1, 1), views, "bilinear", 27)
    rng = np.random.default_rng(4)
    frames = [rng.integers(0, 256, (30, 44, 3), np.uint8) for _ in range(3)]
    assert (plan.grid_thw, plan.patches_shape, plan.num_tokens) == ((3, 9, 1), (27, 192), 27)
    patches = write_patches(lambda index: frames[index], plan, 2).array.reshape(3, 9, 3, 8, 8)
    for frame, rows in zip(frames, patches, strict=True):
        tiles = []
        for view in views:
            canvas = draw_view(frame, view, "bilinear")
            for y, x in itertools.product(range(0, view.height, 8), range(0, view.width, 8)):
                tiles.append(canvas[y : y + 8, x : x + 8].transpose(2, 0, 1))
        np.testing.assert_array_equal(rows, np.stack(tiles))


def test_tiles_of_a_view_follow_each_other():
    """Each is laid out as if it were a frame, whatever patches are merged; its grid is a segment's."""
    views = (View(16, 32, 16, 32, tiles=(1, 1)), View(48, 32, 48, 32, tiles=(3, 2)))
    plan = FramePlan((0, 1), 48, 32, PatchLayout(4, 1, 2), views, num_embeddings=64)
    assert plan.segment_grids == ((4, 8), *[(4, 4)] * 6) * 2
    rng = np.random.default_rng(5)
    frames = [rng.integers(0, 256, (48, 32, 3), np.uint8) for _ in range(2)]
    rows = iter(write_patches(lambda index: frames[index], plan, 1).torch().split([32, *[16] * 6] * 2))
    for frame in frames:
        whole = resize_frame(frame, 16, 32).numpy()
        slices = [frame[y : y + 16, x : x + 16] for y in (0, 16, 32) for x in (0, 16)]
        for tile in (whole, *slices):
            alone = FramePlan((0,), tile.shape[0], tile.shape[1], plan.layout)
            assert torch.equal(next(rows), reference([tile.copy()], alone))
    assert FramePlan((0,), 48, 32, plan.layout, (View(48, 32, 48, 32),)).segment_grids == ()


def test_each_frame_touches_only_its_own_place():
    plan = FramePlan(tuple(range(6)), 32, 64, PatchLayout(16, 2, 2))
    output = torch.full(plan.patches_shape, 7, dtype=torch.uint8)
    PatchWriter(plan, output).write(3, np.zeros((32, 64, 3), np.uint8))
    written = output.view(3, 2 * 4, 3, 2, 16, 16) == 0
    assert written[1, :, :, 1].all()
    assert int(written.sum()) == 32 * 64 * 3


def test_order_of_writing_does_not_matter():
    plan = FramePlan(tuple(range(9)), 64, 96, PatchLayout(16, 2, 2))
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (50, 70, 3), np.uint8) for _ in range(9)]
    expected = write_patches(lambda index: frames[index], plan, 1).torch()
    output = torch.zeros(plan.patches_shape, dtype=torch.uint8)
    writer = PatchWriter(plan, output)
    order = list(range(9))
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: writer.write(i, frames[i]), order))
    assert torch.equal(output, expected)


def test_writing_starts_no_threads():
    """PyTorch's parallel copy would give each worker a team of its own; sixteen threads on four cores help nobody."""
    script = """
import os, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np, torch
from filmstrip.media.patches import PatchWriter
from filmstrip.types import FramePlan, PatchLayout

torch.set_num_threads(4)
plan = FramePlan(tuple(range(8)), 512, 512, PatchLayout(16, 2, 2))
writer = PatchWriter(plan, torch.zeros(plan.patches_shape, dtype=torch.uint8))
frame = np.zeros((600, 700, 3), np.uint8)
before = len(os.listdir("/proc/self/task"))
with ThreadPoolExecutor(3) as workers:
    barrier = threading.Barrier(3)
    list(workers.map(lambda i: (barrier.wait(60), writer.write(i, frame)), range(3)))
    print(len(os.listdir("/proc/self/task")) - before)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(shown.stdout) == 3


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


def test_a_frame_that_cannot_be_had_is_an_error():
    plan = FramePlan((0, 1), 32, 32, PatchLayout(16, 2, 2))

    def broken(index):
        raise OSError(f"frame {index}")

    with pytest.raises(OSError, match="frame"):
        write_patches(broken, plan, 2)
