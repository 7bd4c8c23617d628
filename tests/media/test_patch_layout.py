"""Patches lie where the reference puts them, whatever the sizes and whoever writes first."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from filmstrip.media.patches import PatchWriter, resize_frame, write_patches
from filmstrip.types import FramePlan, PatchLayout


def reference(frames, plan):
    """``patchify`` of the reference processor: uint8 (T, C, H, W), padded by the last frame, viewed and permuted."""
    size, group, merge = plan.layout.patch_size, plan.layout.temporal_patch_size, plan.layout.merge_size
    video = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames])
    video = torch.cat([video, video[-1:].expand(-len(video) % group, -1, -1, -1)])
    t, h, w = len(video) // group, plan.height // size, plan.width // size
    view = video.view(t, group, 3, h // merge, merge, size, w // merge, merge, size)
    return view.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * group * size * size)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "layout", [PatchLayout(16, 2, 2), PatchLayout(14, 2, 2), PatchLayout(8, 1, 1), PatchLayout(4, 3, 3)]
)
def test_layout(num_frames, layout):
    factor = layout.patch_size * layout.merge_size
    plan = FramePlan(tuple(range(num_frames)), 2 * factor, 3 * factor, layout)
    rng = np.random.default_rng(num_frames)
    frames = [rng.integers(0, 256, (plan.height, plan.width, 3), np.uint8) for _ in range(num_frames)]
    patches = write_patches(lambda index: frames[index], plan, 2)
    assert torch.equal(patches.torch(), reference(frames, plan))


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


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (200, 31), (1, 1), (37, 640)])
def test_resize_is_torchs_own_on_unsigned_bytes(size):
    frame = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
    batch = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
    expected = F.interpolate(batch, (64, 96), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(resize_frame(frame, 64, 96), expected[0].permute(1, 2, 0))


def test_a_frame_that_cannot_be_had_is_an_error():
    plan = FramePlan((0, 1), 32, 32, PatchLayout(16, 2, 2))

    def broken(index):
        raise OSError(f"frame {index}")

    with pytest.raises(OSError, match="frame"):
        write_patches(broken, plan, 2)
