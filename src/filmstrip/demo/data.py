"""Seeds in, pixels and prompts as the server would give them to the model out: clips go through the real media layer.

A pool holds what was decoded (patches as uint8, the times of the frames), because rendering, encoding and decoding cost more
than a training step; questions about it are drawn anew each time.

    python -m filmstrip.demo.data POOL --num-shards 80       make or go on with a pool
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from filmstrip.config import MediaConfig, ProcessorConfig
from filmstrip.demo.clips import encode_picture, encode_scene
from filmstrip.demo.questions import Question, View
from filmstrip.demo.recipe import make_model, make_tokenizer, write_checkpoint
from filmstrip.demo.scenes import Scene, Thing, make_picture_scene, make_scene, picture_of
from filmstrip.media.image import open_image, probe_image
from filmstrip.media.patches import PatchWriter
from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_patches
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.placeholders import Assembled, assemble
from filmstrip.processing.qwen3_vl import Qwen3VLProcessor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FramePlan, FrameSampling, Modality, PatchLayout, PixelLimits

CLIPS_PER_SHARD = 256
HELD_OUT_SEED = 1_000_000_000
"""Seeds from here on are for measuring; training never sees them."""

Rows = tuple[str, int, int]
"""Patches of a pool: name of the shard, first row, and the row behind the last."""

_PICTURE_SHARE = 0.12
_MAX_IMAGE_PIXELS = 1 << 24


@dataclass(frozen=True)
class Shown:
    """One clip or picture as the model sees it; ``rows`` is the place of its patches in the shard.

    ``of_seed`` is the scene whose first shape a picture shows, where it was made for one.
    """

    kind: str
    seed: int
    of_seed: int | None
    height: int
    width: int
    frame_seconds: tuple[float, ...]
    rows: tuple[int, int]

    def scene(self) -> Scene:
        """What it shows."""
        if self.kind == "video":
            return _scene_of(self.seed)
        if self.of_seed is not None:
            return picture_of(_scene_of(self.of_seed).shapes[0], self.seed)
        return make_picture_scene(self.seed)

    def view(self) -> View:
        """What it shows, at the frames that were sampled."""
        return _view_of(self)

    def media(self, layout: PatchLayout) -> PlannedMedia:
        """How it stands in a prompt."""
        plan = FramePlan(tuple(range(max(len(self.frame_seconds), 1))), self.height, self.width, layout)
        return PlannedMedia(Modality.VIDEO if self.kind == "video" else Modality.IMAGE, plan, self.frame_seconds)


@dataclass(frozen=True)
class Turn:
    """A question and its answer: which of the ``tokens`` the model has to say, and where it must know a thing.

    That is at the last token of a question about it, and right before a sentence about it; ``asked`` is the place of the
    question's last token.
    """

    tokens: list[int]
    is_answer: list[bool]
    things: list[tuple[int, Thing]]
    asked: int


class Watcher:
    """Filmstrip's own preprocessing for one checkpoint directory, without a server around it."""

    def __init__(self, checkpoint: Path) -> None:
        files = CheckpointFiles(str(checkpoint))
        self.tokenizer = Tokenizer(str(checkpoint))
        self._processor = Qwen3VLProcessor(self.tokenizer, files, ProcessorConfig(), MediaConfig())
        vision = files.json("config.json")["vision_config"]
        self.layout = PatchLayout(vision["patch_size"], vision["temporal_patch_size"], vision["spatial_merge_size"])
        special = self.tokenizer.special_tokens
        self._start, self._end = special["<|im_start|>"], special["<|im_end|>"]
        self._vision_start, self._vision_end = special["<|vision_start|>"], special["<|vision_end|>"]
        self._pads = {"video": special["<|video_pad|>"], "picture": special["<|image_pad|>"]}
        self.visual_tokens = tuple(self._pads.values())
        self.encode = lru_cache(maxsize=200_000)(lambda text: tuple(self.tokenizer.encode_text(text)))

    def watch(self, clip: bytes, sampling: FrameSampling) -> tuple[np.ndarray, FramePlan, tuple[float, ...]]:
        """Patches (uint8), plan and real frame times of an encoded clip."""
        reader = open_video(BytesSource(clip))
        try:
            plan = self._processor.plan_video(reader.metadata, sampling, PixelLimits(), presampled=False)
            patches, indices = read_patches(reader, plan, 1)
            return patches.torch().numpy().copy(), plan, tuple(reader.metadata.timestamps[list(indices)].tolist())
        finally:
            reader.close()

    def look(self, picture: bytes) -> tuple[np.ndarray, FramePlan]:
        """Patches (uint8) and plan of an encoded picture."""
        source = BytesSource(picture)
        plan = self._processor.plan_image(probe_image(source, _MAX_IMAGE_PIXELS), PixelLimits())
        patches = torch.empty(plan.patches_shape, dtype=torch.uint8)
        PatchWriter(plan, patches).write(0, np.array(open_image(source, _MAX_IMAGE_PIXELS)))
        return patches.numpy(), plan

    def prefix(self, shown: list[Shown], system: str | None = None) -> Assembled:
        """A prompt up to the question: the user's media, as the chat template and the processor write them."""
        pieces: list[str | int] = []
        if system is not None:
            pieces += [self._start, f"system\n{system}", self._end, "\n"]
        pieces += [self._start, "user\n"]
        counts = {"video": 0, "picture": 0}
        for item in shown:
            counts[item.kind] += 1
            pieces += [f"{item.kind.capitalize()} {counts[item.kind]}: ", self._vision_start, self._pads[item.kind]]
            pieces += [self._vision_end, "\n"]
        expanded = self._processor.expand(pieces, [item.media(self.layout) for item in shown])
        return assemble(expanded, lambda text: list(self.encode(text)))

    def positions(self, prefix: Assembled) -> np.ndarray:
        """M-RoPE positions (3, num_tokens) of a prefix."""
        positions, _ = self._processor.positions(prefix)
        assert positions is not None
        return positions

    def turn(self, question: Question, *, first: bool) -> Turn:
        """A question and its answer as tokens, behind another one's or the first."""
        tokens = [] if first else [*self.encode("\n"), self._start, *self.encode("user\n")]
        tokens += self.encode(question.text)
        things = [(len(tokens) - 1, question.thing)] if question.thing is not None else []
        asked = len(tokens) - 1
        tokens += [self._end, *self.encode("\n"), self._start, *self.encode("assistant\n")]
        answer = [*self.encode(question.answer), self._end]
        if question.listed:
            stop = self.encode("." if "." in question.answer else ",")  # digits are listed with commas
            before = [-1, *(place for place, token in enumerate(answer) if (token,) == stop)]
            things += [(len(tokens) + before[place], thing) for place, thing in enumerate(question.listed)]
        return Turn(tokens + answer, [False] * len(tokens) + [True] * len(answer), things, asked)


class Pool:
    """Shards of decoded clips in a folder: memory-mapped, or on a GPU whole."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """A GPU needs room for all shards, about 1 MB for each clip; each goes there when it is first asked for."""
        self.folder, self._device = folder, torch.device(device)
        self._patches: dict[str, np.ndarray] = {}
        self._on_device: dict[str, torch.Tensor] = {}
        self.items: list[tuple[str, Shown]] = []
        self.refresh()

    def refresh(self) -> None:
        """Find the shards that were written since the last time."""
        for path in sorted(self.folder.glob("*.json")):
            if path.stem not in self._patches:
                self._patches[path.stem] = np.load(path.with_suffix(".npy"), mmap_mode="r")
                self.items.extend((path.stem, _shown(fields)) for fields in json.loads(path.read_text()))

    def gather(self, rows: Sequence[Rows]) -> torch.Tensor:
        """Patches one after the other, uint8 (num_patches, patch_dim), on the pool's device."""
        if any(shard not in self._patches for shard, _, _ in rows):
            self.refresh()  # another process has seen a newer shard
        if self._device.type == "cpu":
            return torch.from_numpy(np.concatenate([self._patches[shard][start:stop] for shard, start, stop in rows]))
        for shard in {shard for shard, _, _ in rows} - self._on_device.keys():
            self._on_device[shard] = torch.from_numpy(self._patches[shard].copy()).to(self._device)
        return torch.cat([self._on_device[shard][start:stop] for shard, start, stop in rows])


def rows_of(item: tuple[str, Shown]) -> Rows:
    """Where an item's patches lie in its pool."""
    return (item[0], *item[1].rows)


def make_shard(folder: Path, number: int, watcher: Watcher, first_seed: int) -> None:
    """Render, encode and decode the clips and pictures of one shard."""
    seeds = range(first_seed + number * CLIPS_PER_SHARD, first_seed + (number + 1) * CLIPS_PER_SHARD)
    shown: list[Shown] = []
    patches: list[np.ndarray] = []
    row = 0
    for seed in seeds:
        for item, pixels in _show(seed, watcher):
            patches.append(pixels)
            shown.append(_shown({**asdict(item), "rows": (row, row + len(pixels))}))
            row += len(pixels)
    name = f"{first_seed + number * CLIPS_PER_SHARD:010d}"
    partial = folder / f".{name}.{os.getpid()}.npy"
    np.save(partial, np.concatenate(patches))
    partial.rename(folder / f"{name}.npy")
    text = folder / f".{name}.{os.getpid()}.json"
    text.write_text(json.dumps([asdict(item) for item in shown]), encoding="utf-8")
    text.rename(folder / f"{name}.json")


def sampling_of(seed: int) -> FrameSampling:
    """How a user asks for a clip's frames: mostly not at all, else by number or by rate."""
    rng = random.Random(f"sampling {seed}")
    roll = rng.random()
    if roll < 0.5:
        return FrameSampling()
    if roll < 0.85:
        return FrameSampling(num_frames=rng.randint(6, 24))
    return FrameSampling(fps=rng.choice((1.5, 2.0, 3.0, 5.0)), min_frames=4)


def _show(seed: int, watcher: Watcher) -> list[tuple[Shown, np.ndarray]]:
    """A clip, and sometimes a picture, of its first shape or another one."""
    scene = make_scene(seed)
    pixels, plan, times = watcher.watch(encode_scene(scene), sampling_of(seed))
    shown = [(Shown("video", seed, None, plan.height, plan.width, times, (0, 0)), pixels)]
    rng = random.Random(f"picture? {seed}")
    if rng.random() < _PICTURE_SHARE:
        of_seed = seed if scene.shapes and rng.random() < 0.6 else None
        picture = Shown("picture", seed, of_seed, 0, 0, (), (0, 0))
        pixels, plan = watcher.look(encode_picture(picture.scene()))
        shown.append((Shown("picture", seed, of_seed, plan.height, plan.width, (), (0, 0)), pixels))
    return shown


@lru_cache(maxsize=50_000)
def _scene_of(seed: int) -> Scene:
    """Finding places where nothing touches takes milliseconds, and the same clips are asked about again and again."""
    return make_scene(seed)


@lru_cache(maxsize=50_000)
def _view_of(shown: Shown) -> View:
    return View(shown.scene(), shown.frame_seconds or (0.0,))


def _shown(fields: dict) -> Shown:
    return Shown(**{**fields, "frame_seconds": tuple(fields["frame_seconds"]), "rows": tuple(fields["rows"])})


def blank_checkpoint(folder: Path) -> Path:
    """A checkpoint with untrained weights in ``folder``, made if it is missing: tokenizer and settings for a Watcher."""
    if not (folder / "video_preprocessor_config.json").exists():
        tokenizer = make_tokenizer()
        write_checkpoint(folder, tokenizer, make_model(tokenizer, seed=0))
    return folder


def main() -> None:
    """Write the shards that are missing."""
    parser = argparse.ArgumentParser(prog="python -m filmstrip.demo.data", description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="directory with tokenizer and processor settings"
    )
    parser.add_argument("--num-shards", type=int, default=80, help=f"of {CLIPS_PER_SHARD} clips (default: %(default)s)")
    parser.add_argument("--first-shard", type=int, default=0)
    parser.add_argument("--step", type=int, default=1, help="make every STEP-th shard only: one of several workers")
    parser.add_argument("--held-out", action="store_true", help="of the seeds for measuring")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.pool.mkdir(parents=True, exist_ok=True)
    watcher = Watcher(arguments.checkpoint)
    first_seed = HELD_OUT_SEED if arguments.held_out else 0
    for number in range(arguments.first_shard, arguments.num_shards, arguments.step):
        if not (arguments.pool / f"{first_seed + number * CLIPS_PER_SHARD:010d}.json").exists():
            make_shard(arguments.pool, number, watcher, first_seed)


if __name__ == "__main__":
    main()
