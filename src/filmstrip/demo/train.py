"""A pool of decoded clips in, the trained demo model out; killed or stopped at any time, the same command goes on.

    python -m filmstrip.demo.train WORK

WORK holds ``base`` (an untrained checkpoint), ``pool`` and ``val`` (see :mod:`filmstrip.demo.data`), and gets ``state.pt``
(everything needed to go on), ``log.jsonl`` (one object per line) and ``model`` (the checkpoint, bfloat16).

Three lessons follow each other. The text model learns to answer from facts: a linear layer's embedding of what lies in each
cell stands where features of pixels will be, few groups of frames at first. The vision tower learns, from single groups of
frames of many clips, to say what lies in each cell in that embedding's words. Then both work together on whole clips.

Each clip is encoded once and asked about many times: every question stands behind the same prompt prefix, at the positions
it would have alone, and sees the prefix and itself only (Krell et al., "Efficient Sequence Packing", 2021, with a shared
prefix). So a step of 20 clips teaches about 400 questions.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import os
import queue
import random
import shutil
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from filmstrip.demo.data import Pool, Rows, Shown, Watcher, blank_checkpoint, rows_of
from filmstrip.demo.questions import (
    WEIGHTS,
    Question,
    View,
    ask_in_turn,
    ask_of_picture,
    ask_of_two,
    ask_some,
    list_looks,
    transcribe,
)
from filmstrip.demo.recipe import TIMES, make_model, write_checkpoint
from filmstrip.demo.scenes import Thing
from filmstrip.demo.teacher import (
    Cells,
    Clocks,
    ClockTeacher,
    FactEmbedding,
    HistoryTeacher,
    Stories,
    StoryTeacher,
    Teacher,
    cells_of,
    distance,
)
from filmstrip.models.cpu_features import cpu_has_bfloat16_units

ATTENTION_NAME = "filmstrip_demo_training"

_ITEMS_PER_DRAW = 64
_TOKENS_PER_DRAWN_BATCH = 4096
_LENGTH_MULTIPLE = 8
"""Of a batch's padded length: GPU kernels copy masks of other lengths."""
_STRANGER_SHARE = 0.35
"""Of videos shown beside another one, those chosen blindly."""
_NUM_PARTNER_CANDIDATES = 12
_MAX_GROUPS_OF_FACTS = 40
_MAX_GROUPS_OF_TWO = 80
"""Two clips of 20 seconds, at four frames per second each."""
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer the question about the video.", "You are Filmstrip.")
_DRAWN_AHEAD = 4
_LOADED_AHEAD = 4
"""By each process: a draw takes as long as many steps do on a GPU."""
_GROUPS_OF_GLIMPSE = 1
_QUESTIONS_OF_CLIP = 16
_QUESTIONS_OF_FACTS = 8
_FEW_GROUPS = 5
_EMPTINESS = 4
"""The higher, the fewer empty cells a prompt of facts shows: a random share to this power."""
_LIST_SHARE = 0.6
_GLIMPSED_SHARE = 0.5
_QUERY_KEY_SCALE = 1.5
_LOG_PERIODS = (-0.5, 2.0)
"""Of the waves that times start as: 0.3 to 100 seconds."""
_HISTORY_LAYERS = (1, 3)
"""Behind which layers of the text model its visual tokens are asked what earlier groups tell, and questions for times."""
_STORY_LAYER = 4
"""Behind which the places that must know a thing are asked for its story."""
_HEAD_RATE = 4.0
"""Of the learning rate, for teachers that learn alone."""
_MUON_SCALE = 3.0
"""Muon's learning rate in AdamW's."""
_MALLOC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
_INPUT_NAMES = {"video": ("pixel_values_videos", "video_grid_thw"), "picture": ("pixel_values", "image_grid_thw")}


@dataclass
class Seen:
    """Where patches lie in the pool, with their grids, and the facts of their cells, by kind of medium."""

    rows: dict[str, list[tuple[list[Rows], tuple[int, int, int]]]]
    cells: dict[str, list[Cells]]


@dataclass
class Sample(Seen):
    """One prompt with its questions, packed. ``segments``: 0 for the prefix, else the number of the question's chain."""

    tokens: list[int]
    positions: np.ndarray
    segments: list[int]
    is_answer: list[bool]
    kinds: list[tuple[str, int]]
    """Kind of each answer, and how many tokens it has."""
    places: np.ndarray
    """Of the visual tokens."""
    all_cells: Cells
    """Facts of the visual tokens, in the prompt's order."""
    asked: list[int]
    """Places where the model must know a thing, and what the clip tells of it."""
    stories: Stories
    ends: list[int]
    """Places of the last tokens of questions, and what they need to know of times."""
    clocks: Clocks
    shows_facts: bool = False


@dataclass
class Glimpses:
    """Patches (by their rows in the pool) and grids of videos and of pictures, and what lies in their tokens' cells."""

    rows: dict[str, tuple[list[Rows], torch.Tensor]]
    cells: dict[str, Cells]


@dataclass
class Batch(Glimpses):
    """Samples side by side; ``targets`` are flat places in (batch, token) that say which token comes next."""

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    targets: torch.Tensor
    kinds: list[tuple[str, int]]
    places: torch.Tensor
    """Flat places of the visual tokens."""
    all_cells: Cells
    """Facts of the visual tokens, in the prompts' order."""
    asked: torch.Tensor
    """Flat places where the model must know a thing, and what the clip tells of it."""
    stories: Stories
    ends: torch.Tensor
    """Flat places of the last tokens of questions, and what they need to know of times."""
    clocks: Clocks
    shows_facts: bool


def pack(watcher: Watcher, items: list[tuple[str, Shown]], chains: list[list[Question]], system: str | None) -> Sample:
    """A prompt about ``items`` and chains of questions, each of which starts right behind it."""
    shown = [each for _, each in items]
    all_cells = _cells(watcher, shown)
    sample = _packed(watcher, shown, all_cells, chains, system)
    for item, cells in zip(items, all_cells, strict=True):
        sample.rows[item[1].kind].append(([rows_of(item)], item[1].media(watcher.layout).plan.grid_thw))
        sample.cells[item[1].kind].append(cells)
    return sample


def pack_facts(
    watcher: Watcher, shown: list[Shown], chains: list[list[Question]], system: str | None, rng: random.Random
) -> Sample:
    """As :func:`pack`, facts in place of pixels. Most empty cells are left out, which makes prompts half as long."""
    sample = _packed(watcher, shown, _cells(watcher, shown), chains, system)
    cells = sample.all_cells
    kept_share = rng.random() ** _EMPTINESS
    is_kept = (cells.colours > 0) | np.array([rng.random() < kept_share for _ in cells.colours])
    keep = np.ones(len(sample.tokens), bool)
    keep[sample.places] = is_kept
    sample.tokens = list(itertools.compress(sample.tokens, keep))
    sample.segments = list(itertools.compress(sample.segments, keep))
    sample.is_answer = list(itertools.compress(sample.is_answer, keep))
    sample.positions = sample.positions[:, keep]
    sample.places = (np.cumsum(keep) - 1)[sample.places[is_kept]]
    sample.all_cells = cells.keep(is_kept)
    sample.asked = (np.cumsum(keep) - 1)[sample.asked].tolist()
    sample.ends = (np.cumsum(keep) - 1)[sample.ends].tolist()
    sample.shows_facts = True
    return sample


def _packed(
    watcher: Watcher, shown: list[Shown], cells: list[Cells], chains: list[list[Question]], system: str | None
) -> Sample:
    prefix = watcher.prefix(shown, system)
    tokens, segments = list(prefix.token_ids), [0] * len(prefix.token_ids)
    is_answer = [False] * len(tokens)
    positions = [watcher.positions(prefix)]
    start = int(positions[0].max()) + 1
    kinds: list[tuple[str, int]] = []
    asked: list[int] = []
    ends: list[int] = []
    things: list[tuple[Thing, View, int]] = []
    for number, chain in enumerate(chains, 1):
        length = 0
        for place, question in enumerate(chain):
            turn = watcher.turn(question, first=place == 0)
            asked += [len(tokens) + at for at, _ in turn.things]
            things += [(thing, *_home_of(thing, shown)) for _, thing in turn.things]
            ends.append(len(tokens) + turn.asked)
            tokens += turn.tokens
            is_answer += turn.is_answer
            length += len(turn.tokens)
            kinds.append((question.kind, sum(turn.is_answer)))
        segments += [number] * length
        positions.append(np.broadcast_to(np.arange(start, start + length), (3, length)))
    all_positions = np.concatenate(positions, axis=1)
    places = np.flatnonzero(np.isin(tokens, watcher.visual_tokens))
    seen: tuple[dict, dict] = (defaultdict(list), defaultdict(list))
    return Sample(
        *seen,
        tokens,
        all_positions,
        segments,
        is_answer,
        kinds,
        places,
        Cells.join(cells),
        asked,
        Stories.of(things),
        ends,
        Clocks.of(list(itertools.chain.from_iterable(chains)), [each.view() for each in shown if each.kind == "video"]),
    )


def _home_of(thing: Thing, shown: list[Shown]) -> tuple[View, int]:
    """The video that shows ``thing``, and its number."""
    views = [each.view() for each in shown if each.kind == "video"]
    return next(
        (view, number) for number, view in enumerate(views) if any(thing is other for other in view.scene.things)
    )


def _cells(watcher: Watcher, shown: list[Shown]) -> list[Cells]:
    side = watcher.layout.patch_size * watcher.layout.merge_size
    numbers = itertools.count()
    return [
        cells_of(each.view(), each.height, each.width, side, number=next(numbers) if each.kind == "video" else None)
        for each in shown
    ]


def thinned(shown: Shown, rng: random.Random, max_groups: int) -> Shown:
    """A video at fewer of its frames, evenly spread: two to ``max_groups`` groups."""
    num_frames = len(shown.frame_seconds)
    num_groups = (num_frames + 1) // 2
    wanted = rng.randint(2, max(2, min(num_groups, max_groups)))
    if shown.kind != "video" or wanted >= num_groups:
        return shown
    chosen = np.linspace(0, num_frames - 1, 2 * wanted).round().astype(int)
    return replace(shown, frame_seconds=tuple(shown.frame_seconds[index] for index in chosen))


def glimpse(watcher: Watcher, item: tuple[str, Shown], rng: random.Random, max_groups: int) -> Seen:
    """A picture, or a few groups of frames of a video, chosen at random."""
    shown = item[1]
    shard, first, _ = rows_of(item)
    grid_t, grid_h, grid_w = shown.media(watcher.layout).plan.grid_thw
    chosen = sorted(rng.sample(range(grid_t), min(grid_t, max_groups)))
    size = grid_h * grid_w
    rows = [(shard, first + group * size, first + (group + 1) * size) for group in chosen]
    view = shown.view()
    part = View(view.scene, [seconds for group in chosen for seconds in view.groups[group]])
    cells = cells_of(part, shown.height, shown.width, watcher.layout.patch_size * watcher.layout.merge_size)
    return Seen({shown.kind: [(rows, (len(chosen), grid_h, grid_w))]}, {shown.kind: [cells]})


def collate(samples: list[Sample], pad_token: int) -> Batch:
    """Samples as one padded batch."""
    length = max(len(sample.tokens) for sample in samples)
    length += -length % _LENGTH_MULTIPLE
    tokens = np.full((len(samples), length), pad_token)
    segments = np.full((len(samples), length), -1)
    positions = np.zeros((3, len(samples), length), np.int64)
    is_answer = np.zeros((len(samples), length), bool)
    for row, sample in enumerate(samples):
        num_tokens = len(sample.tokens)
        tokens[row, :num_tokens] = sample.tokens
        segments[row, :num_tokens] = sample.segments
        positions[:, row, :num_tokens] = sample.positions
        is_answer[row, :num_tokens] = sample.is_answer
    glimpses = _side_by_side(samples)
    targets = torch.from_numpy(np.flatnonzero(is_answer))
    kinds = [kind for sample in samples for kind in sample.kinds]
    places = torch.from_numpy(np.concatenate([row * length + sample.places for row, sample in enumerate(samples)]))
    return Batch(
        *(glimpses.rows, glimpses.cells),
        *(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(segments), targets, kinds),
        *(places, Cells.join([sample.all_cells for sample in samples])),
        torch.tensor([row * length + place for row, sample in enumerate(samples) for place in sample.asked]).long(),
        Stories.join([sample.stories for sample in samples]),
        torch.tensor([row * length + place for row, sample in enumerate(samples) for place in sample.ends]),
        Clocks.join([sample.clocks for sample in samples]),
        samples[0].shows_facts,
    )


def _shape_of(seen: Seen) -> tuple[int, ...]:
    """Rows and columns of patches."""
    ((_, grid),) = next(iter(seen.rows.values()))
    return grid[1:]


def _side_by_side(samples: Sequence[Seen]) -> Glimpses:
    rows: dict[str, tuple[list[Rows], torch.Tensor]] = {}
    for kind in ("video", "picture"):
        parts = [part for sample in samples for part in sample.rows.get(kind, ())]
        if parts:
            together = list(itertools.chain.from_iterable(part for part, _ in parts))
            rows[kind] = (together, torch.tensor([grid for _, grid in parts]))
    facts = {kind: [part for sample in samples for part in sample.cells.get(kind, ())] for kind in rows}
    return Glimpses(rows, {kind: Cells.join(parts) for kind, parts in facts.items()})


def mask_of(segments: torch.Tensor) -> torch.Tensor:
    """What is added to attention's scores, (batch, 1, length, length): a question sees the prefix and itself only."""
    theirs, ours = segments[:, None, None, :], segments[:, None, :, None]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    may_see = ((theirs == 0) | (theirs == ours)) & causal
    return torch.zeros(may_see.shape, dtype=torch.bfloat16, device=segments.device).masked_fill_(~may_see, -torch.inf)


class Drawer:
    """Draws prompts from a pool; the same numbers draw the same prompts as long as the pool is the same."""

    def __init__(self, watcher: Watcher, pool: Pool, max_tokens: int, pair_share: float) -> None:
        """``max_tokens`` bounds a batch, padding included; ``pair_share`` of the videos are shown beside another one."""
        if not pool.items:
            raise ValueError("the pool is empty: make some shards with python -m filmstrip.demo.data first")
        self._watcher, self._pool, self._max_tokens, self._pair_share = watcher, pool, max_tokens, pair_share
        self._pad = watcher.tokenizer.special_tokens["<|endoftext|>"]
        # Larger batches come from larger draws, or the lengths beside each other would differ more.
        self._num_items = max(_ITEMS_PER_DRAW, _ITEMS_PER_DRAW * max_tokens // _TOKENS_PER_DRAWN_BATCH)

    def refresh(self) -> None:
        """Draw from shards, too, that were written since the last time."""
        self._pool.refresh()

    def batches(self, number: int) -> Iterator[Batch]:
        """The batches of draw number ``number``: prompts of about the same length lie together."""
        yield from self._batches(random.Random(f"draw {number}"), None)

    def fact_batches(self, number: int, max_groups: int) -> Iterator[Batch]:
        """As :meth:`batches`, facts in place of pixels, and at most ``max_groups`` groups of frames of a video."""
        yield from self._batches(random.Random(f"facts {number}"), max_groups)

    def _batches(self, rng: random.Random, max_groups: int | None) -> Iterator[Batch]:
        drawn = [self._sample(rng, max_groups) for _ in range(self._num_items)]
        samples = sorted((sample for sample in drawn if sample is not None), key=lambda sample: len(sample.tokens))
        groups: list[list[Sample]] = [[]]
        for sample in samples:
            if groups[-1] and (len(groups[-1]) + 1) * len(sample.tokens) > self._max_tokens:
                groups.append([])
            groups[-1].append(sample)
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, self._pad)

    def glimpses(self, number: int) -> Glimpses:
        """A few groups of frames of many clips: what the vision tower learns from alone; as many tokens as a batch has."""
        rng = random.Random(f"glimpses {number}")
        seen: list[Seen] = []
        num_tokens = 0
        while num_tokens < _GLIMPSED_SHARE * self._max_tokens:
            item = rng.choice(self._pool.items)
            seen.append(glimpse(self._watcher, item, rng, _GROUPS_OF_GLIMPSE))
            num_tokens += sum(len(cells.colours) for cells in seen[-1].cells[item[1].kind])
        seen.sort(key=_shape_of)  # frames of one shape go through attention together
        return _side_by_side(seen)

    def _sample(self, rng: random.Random, max_groups: int | None) -> Sample | None:
        num_questions = _QUESTIONS_OF_CLIP if max_groups is None else _QUESTIONS_OF_FACTS
        chosen = self._choose(rng)
        if max_groups is not None:
            chosen = [(shard, thinned(shown, rng, max_groups)) for shard, shown in chosen]
        shown = [each for _, each in chosen]
        system = rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.08 else None
        questions = _questions_about(shown, rng, num_questions)
        chains = [[question] for question in questions]
        if len(shown) == 1 and shown[0].kind == "video" and rng.random() < 0.35:
            chain = ask_in_turn(shown[0].view(), rng, 4)
            chains += [chain] if chain else []
        if not chains:
            return None
        if max_groups is not None:
            return pack_facts(self._watcher, shown, chains, system, rng)
        return pack(self._watcher, chosen, chains, system)

    def _choose(self, rng: random.Random) -> list[tuple[str, Shown]]:
        """A video, two videos, a picture, or a picture and a video."""
        place = rng.randrange(len(self._pool.items))
        item = self._pool.items[place]
        if item[1].kind == "picture":
            if rng.random() < 0.25:
                return [item]
            # The video that a picture was made for stands right before it.
            video = self._pool.items[place - 1] if item[1].of_seed is not None else self._video(rng)
            video = video if video[1].kind == "video" else self._video(rng)
            return [item, video] if rng.random() < 0.5 else [video, item]
        if rng.random() < self._pair_share:
            other = self._partner(item[1], rng)
            num_frames = len(item[1].frame_seconds) + len(other[1].frame_seconds)
            both = [item, other] if rng.random() < 0.5 else [other, item]
            return both if num_frames <= 2 * _MAX_GROUPS_OF_TWO else [item]
        return [item]

    def _partner(self, shown: Shown, rng: random.Random) -> tuple[str, Shown]:
        """Another video; most have something in common with the first, so that both are the answer often enough."""
        if rng.random() < _STRANGER_SHARE:
            return self._video(rng)
        seen = _looks_and_motions(shown)
        candidates = [self._video(rng) for _ in range(_NUM_PARTNER_CANDIDATES)]
        return max(candidates, key=lambda candidate: len(seen & _looks_and_motions(candidate[1])))

    def _video(self, rng: random.Random) -> tuple[str, Shown]:
        while (item := rng.choice(self._pool.items))[1].kind != "video":
            pass
        return item


def _questions_about(shown: list[Shown], rng: random.Random, num_questions: int) -> list[Question]:
    views = [each.view() for each in shown if each.kind == "video"]
    pictures = [each.scene() for each in shown if each.kind == "picture"]
    if pictures and not views:
        return _different(ask_of_picture(pictures[0], None, rng) for _ in range(5))
    if pictures:
        questions = _different(ask_of_picture(pictures[0], views[0], rng) for _ in range(10))
        return questions + ask_some(views[0], rng, 3, WEIGHTS)
    if len(views) == 2:
        return _different(ask_of_two((views[0], views[1]), rng) for _ in range(2 * num_questions))
    lists = [
        question for question in (transcribe(views[0]), list_looks(views[0])) if question and rng.random() < _LIST_SHARE
    ]
    return lists + ask_some(views[0], rng, num_questions, WEIGHTS)


def _looks_and_motions(shown: Shown) -> set[str]:
    things = shown.scene().things
    shapes = [thing for thing in things if not thing.is_digit]
    return (
        {thing.shape for thing in things if thing.is_digit}
        | {thing.motion for thing in shapes}
        | {f"{thing.colour} {thing.shape}" for thing in shapes}
    )


def _different(questions: Iterator[Question | None]) -> list[Question]:
    return list({question.text: question for question in questions if question is not None}.values())


def _prepare(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights that training starts from, where those that Transformers draws are slow to leave."""
    for merger in model.model.visual.deepstack_merger_list:  # silent until text and pixels meet
        nn.init.zeros_(merger.linear_fc2.weight)
        nn.init.zeros_(merger.linear_fc2.bias)
    # Times that lie near each other start alike: waves of their seconds, in place of random numbers.
    embeddings: Any = model.get_input_embeddings().weight
    seconds = torch.tensor([float(text) for text in TIMES])[:, None]
    periods = torch.logspace(_LOG_PERIODS[0], _LOG_PERIODS[1], embeddings.shape[1] // 2)
    waves = torch.cat([(2 * torch.pi * seconds / periods).sin(), (2 * torch.pi * seconds / periods).cos()], 1)
    with torch.no_grad():
        embeddings[tokenizer.convert_tokens_to_ids(list(TIMES))] = waves * (embeddings.std() / waves.std())
    for layer in model.model.language_model.layers:
        # Normed queries and keys of ones cannot single out one token of hundreds, and their scale grows slowly.
        nn.init.constant_(layer.self_attn.q_norm.weight, _QUERY_KEY_SCALE)
        nn.init.constant_(layer.self_attn.k_norm.weight, _QUERY_KEY_SCALE)


def fit_for_training(model: Qwen3VLForConditionalGeneration) -> None:
    """Let ``model`` compute the same faster on CPU: whole batches of frames in attention, patches by one matrix product."""
    model.set_attn_implementation({"text_config": ATTENTION_NAME, "vision_config": "sdpa", "": ATTENTION_NAME})
    visual = model.model.visual
    visual.patch_embed.forward = types.MethodType(_embed_patches, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = types.MethodType(_attend_in_frames, block.attn)


def _embed_patches(module: Any, patches: torch.Tensor) -> torch.Tensor:
    return F.linear(patches, module.proj.weight.flatten(1), module.proj.bias)


def _attend_in_frames(
    module: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, position_embeddings: Any, **_: Any
) -> torch.Tensor:
    num_tokens = hidden_states.shape[0]
    qkv = module.qkv(hidden_states).reshape(num_tokens, 3, module.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(qkv[0], qkv[1], *position_embeddings)
    if query.is_cuda:
        return module.proj(attend_in_padded_frames(query, key, qkv[2], cu_seqlens, module.scaling))
    runs = [(length, len(list(run))) for length, run in itertools.groupby(cu_seqlens.diff().tolist())]
    outputs = []
    # Splitting, not slicing: the gradient of a slice is as large as the whole.
    split = [x.split([length * count for length, count in runs]) for x in (query, key, qkv[2])]
    for number, (length, count) in enumerate(runs):
        shape = (count, length, module.num_heads, -1)
        query, key, value = (x[number].reshape(shape).transpose(1, 2) for x in split)
        outputs.append(_attend(query, key, value, None, module.scaling).transpose(1, 2).flatten(0, 1))
    return module.proj(torch.cat(outputs).reshape(num_tokens, -1))


def attend_in_padded_frames(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float
) -> torch.Tensor:
    """All frames at once, (num_tokens, heads, head_dim) -> (num_tokens, hidden_size): GPUs wait for launches most."""
    lengths = cu_seqlens.diff()
    slots = torch.arange(int(lengths.max()), device=lengths.device)
    is_full = slots < lengths[:, None]
    places = torch.where(is_full, cu_seqlens[:-1, None] + slots, 0)
    mask = torch.zeros(is_full.shape, dtype=query.dtype, device=query.device).masked_fill_(~is_full, -torch.inf)
    padded = (x[places].transpose(1, 2) for x in (query, key, value.to(query.dtype)))
    output = F.scaled_dot_product_attention(*padded, attn_mask=mask[:, None, None, :], scale=scaling)
    return output.transpose(1, 2)[is_full].flatten(1)


def _attend_masked(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface; ``attention_mask`` is added to the scores."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if query.is_cuda:
        mask = None if attention_mask is None else attention_mask.to(query.dtype)
        output = F.scaled_dot_product_attention(query, key, value.to(query.dtype), attn_mask=mask, scale=scaling)
        return output.transpose(1, 2).contiguous(), None
    return _attend(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention written out: for these sizes twice as fast in bfloat16 as PyTorch's fused kernel is on CPU."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return torch.softmax(scores, -1, dtype=scores.dtype) @ value


AttentionInterface.register(ATTENTION_NAME, _attend_masked)


def _fast_products(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 on a GPU, and on a CPU that has units for it; others would be many times slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bfloat16_units())


def watch(model: Qwen3VLForConditionalGeneration, batch: Glimpses, pool: Pool) -> dict[str, torch.Tensor]:
    """Features of the merged tokens of videos and of pictures, (num_tokens, hidden_size)."""
    return {
        kind: model.model.visual(_normalized(pool.gather(rows)), grid_thw=grids.to(model.device)).pooler_output
        for kind, (rows, grids) in batch.rows.items()
    }


def _normalized(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().div_(127.5).sub_(1.0)


def predict(
    model: Qwen3VLForConditionalGeneration, batch: Batch, embedding: FactEmbedding, pool: Pool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits for every answer token, float32 (num_targets, vocabulary), and the tokens themselves."""
    there = model.device
    tokens, targets = batch.tokens.to(there), batch.targets.to(there)
    mask = mask_of(batch.segments.to(there))
    known = {"position_ids": batch.positions.to(there), "attention_mask": mask, "use_cache": False}
    if batch.shows_facts:
        shown = model.get_input_embeddings()(tokens)
        facts = embedding(torch.from_numpy(batch.all_cells.table()).to(there)).to(shown.dtype)
        shown = shown.flatten(0, 1).index_copy(0, batch.places.to(there), facts).view(shown.shape)
        output = model.model.language_model(inputs_embeds=shown, **known)
    else:
        pixels: dict[str, torch.Tensor] = {}
        for kind, (rows, grids) in batch.rows.items():
            pixel_name, grid_name = _INPUT_NAMES[kind]
            pixels[pixel_name] = _normalized(pool.gather(rows))
            pixels[grid_name] = grids.to(there)
        output = model.model(input_ids=tokens, **known, **pixels)
    logits = model.lm_head(output.last_hidden_state.flatten(0, 1)[targets - 1])
    return logits.float(), tokens.flatten()[targets]


def answer_loss(logits: torch.Tensor, wanted: torch.Tensor, kinds: list[tuple[str, int]]) -> torch.Tensor:
    """Mean cross-entropy; an answer of n tokens counts as the square root of n, or lists would drown the short ones."""
    lengths = np.array([length for _, length in kinds])
    weights = torch.from_numpy(np.repeat(lengths**-0.5, lengths)).float().to(logits.device)
    return (weights * F.cross_entropy(logits, wanted, reduction="none")).sum() / weights.sum()


class Scores:
    """Counts of answers said right, every token of them, by kind."""

    def __init__(self) -> None:
        # Kept as they are until someone asks: reading a number from a GPU waits for all that it has to do.
        self._said: list[tuple[torch.Tensor, list[tuple[str, int]]]] = []
        self._seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def see(self, seen: dict[str, torch.Tensor]) -> None:
        """Note what the teacher could read."""
        for name, value in seen.items():
            self._seen[name].append(value)

    def add(self, logits: torch.Tensor, wanted: torch.Tensor, kinds: list[tuple[str, int]]) -> None:
        """Count the answers of a batch."""
        self._said.append((logits.argmax(-1) == wanted, kinds))

    def shares(self) -> dict[str, float]:
        """Share of right answers by kind, and of all."""
        rights: dict[str, list[bool]] = defaultdict(list)
        for said, kinds in self._said:
            right, start = said.tolist(), 0
            for kind, length in kinds:
                rights[kind].append(all(right[start : start + length]))
                start += length
        shares = {kind: round(sum(right) / len(right), 3) for kind, right in sorted(rights.items())}
        seen = {name: round(torch.stack(values).mean().item(), 3) for name, values in self._seen.items()}
        num_right, num_asked = (sum(map(count, rights.values())) for count in (sum, len))
        return {"all": round(num_right / max(num_asked, 1), 3), **shares, **seen}


@dataclass
class State:
    """Where training stands."""

    model: Qwen3VLForConditionalGeneration
    average: Qwen3VLForConditionalGeneration
    teacher: Teacher
    embedding: FactEmbedding
    history: HistoryTeacher
    story: StoryTeacher
    clock: ClockTeacher
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    draw: int = 0


def _optimizers(
    model: Qwen3VLForConditionalGeneration, *helpers: nn.Module, use_muon: bool
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, if wanted, AdamW for tables, patches, biases and norms."""
    matrices, tables, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            others.append(parameter)
        elif parameter.ndim > 2 or any(part in name for part in ("embed", "lm_head")):
            tables.append(parameter)
        else:
            matrices.append(parameter)
    tables.extend(parameter for helper in helpers for parameter in helper.parameters())
    groups = [{"params": tables, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    muon: list[torch.optim.Optimizer] = []
    if use_muon:
        muon = [torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")]
    else:
        groups.append({"params": matrices, "weight_decay": 0.05})
    return [*muon, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)]


def _average_gradients(parameters: list[torch.nn.Parameter], num_workers: int) -> None:
    """Mean of all workers' gradients in each of them."""
    if num_workers == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    distributed.all_reduce(flat)
    flat.div_(num_workers)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


class _Draws(IterableDataset[tuple[Glimpses, int]]):
    """Batches of one draw after the other, each with how many draws are used up when its own is done.

    Of N processes each makes every N-th draw.
    """

    def __init__(self, lesson: Callable[[int], Iterator[Glimpses]], drawer: Drawer, first: int) -> None:
        self._lesson, self._drawer, self._first = lesson, drawer, first

    def __iter__(self) -> Iterator[tuple[Glimpses, int]]:
        worker = get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for draw in itertools.count(self._first + number, step):
            if worker is not None:
                self._drawer.refresh()
            for batch in self._lesson(draw):
                yield batch, draw + 1


class Trainer:
    """One worker of a run in one folder; number 0 writes the files."""

    def __init__(self, arguments: argparse.Namespace, number: int) -> None:
        self._arguments, self._work, self._number = arguments, Path(arguments.work), number
        self._watcher = Watcher(self._work / "base")
        self._tokenizer: PreTrainedTokenizerFast = self._watcher.tokenizer.hf
        self._device = torch.device(arguments.device)
        self._pool = Pool(self._work / "pool", arguments.device)
        self._drawer = Drawer(self._watcher, self._pool, arguments.max_tokens, arguments.pair_share)
        self._meet_step = arguments.fact_steps + arguments.watch_steps
        self._watched: list[torch.Tensor] = []
        self._recalled: list[torch.Tensor] = []
        self._state = self._start()

    def run(self) -> None:
        """Train to the last step, or as long as a run may take."""
        with contextlib.closing(self._drawn()) as drawn:
            self._train(drawn)

    def _train(self, drawn: Iterator[tuple[Glimpses, int]]) -> None:
        state, arguments = self._state, self._arguments
        self._let_learn()
        scores, started = Scores(), time.monotonic()
        losses: list[torch.Tensor] = []
        began = saved = time.monotonic()
        for batch, draw in drawn:
            if state.step >= arguments.steps:
                break
            for optimizer in state.optimizers:
                scale = _MUON_SCALE if isinstance(optimizer, torch.optim.Muon) else 1.0
                for group in optimizer.param_groups:
                    group["lr"] = arguments.learning_rate * scale * self._rate(time.monotonic() - began)
            losses.append(self._step(batch, scores))
            state.step += 1
            if state.step in (arguments.head_steps, arguments.fact_steps, self._meet_step):
                self._let_learn()
            state.draw = draw
            if state.step % arguments.log_steps == 0:
                self._pool.refresh()
            if self._number:
                continue
            if state.step % arguments.log_steps == 0:
                seconds = round((time.monotonic() - started) / arguments.log_steps, 2)
                mean = round(torch.stack(losses).mean().item(), 4)
                self._log(
                    {"loss": mean, "seconds_per_step": seconds, "clips": len(self._pool.items), **scores.shares()}
                )
                scores, losses, started = Scores(), [], time.monotonic()
            if state.step % arguments.measure_steps == 0:
                self._log({"held_out": self._measure()})
                started = time.monotonic()
            is_over = arguments.max_seconds is not None and time.monotonic() - began >= arguments.max_seconds
            if state.step == arguments.steps or is_over or time.monotonic() - saved > arguments.save_seconds:
                self._save()
                saved = time.monotonic()
            if is_over:
                break

    def _start(self) -> State:
        if self._arguments.start_from:
            model_class: Any = Qwen3VLForConditionalGeneration
            model = model_class.from_pretrained(self._work / "base", dtype=torch.float32)
        else:
            model = make_model(self._tokenizer, self._arguments.seed)
            _prepare(model, self._tokenizer)
        nn.Module.to(model, self._device)
        average = copy.deepcopy(model)
        fit_for_training(model)
        fit_for_training(average)
        torch.manual_seed(self._arguments.seed)
        teacher = Teacher(model.lm_head.in_features)
        embedding = FactEmbedding(model.lm_head.in_features)
        history, story = HistoryTeacher(model.lm_head.in_features), StoryTeacher(model.lm_head.in_features)
        clock = ClockTeacher(model.lm_head.in_features)
        for helper in (teacher, embedding, history, story, clock):
            helper.to(self._device)
        model.model.visual.merger.register_forward_hook(lambda _, __, features: self._watched.append(features))
        for place in (*_HISTORY_LAYERS, _STORY_LAYER):
            layer = model.model.language_model.layers[place]
            layer.register_forward_hook(lambda _, __, states: self._recalled.append(states))
        optimizers = _optimizers(
            *(model, teacher, embedding, history, story, clock), use_muon=self._arguments.optimizer == "muon"
        )
        state = State(model, average, teacher, embedding, history, story, clock, optimizers)
        path = self._work / "state.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True, map_location=self._device)
            model.load_state_dict(saved["model"])
            average.load_state_dict(saved["average"])
            teacher.load_state_dict(saved["teacher"])
            embedding.load_state_dict(saved["embedding"])
            history.load_state_dict(saved["history"])
            story.load_state_dict(saved["story"])
            clock.load_state_dict(saved["clock"])
            for optimizer, values in zip(state.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            state.step, state.draw = saved["step"], saved["draw"]
        return state

    def _let_learn(self) -> None:
        """Let the half learn whose lesson it is; when they meet, the vision tower's layers rest, its mergers do not.

        The tower sees well then, and answers alone would make it see worse. Beside trained weights the teachers are new:
        until they can read something, what they ask for would only do harm.
        """
        if self._state.step < self._arguments.head_steps:
            self._state.model.requires_grad_(False)
            self._state.embedding.requires_grad_(False)
            return
        facts, meet = self._state.step < self._arguments.fact_steps, self._state.step >= self._meet_step
        for name, parameter in self._state.model.named_parameters():
            is_visual = name.startswith("model.visual.")
            parameter.requires_grad_((is_visual and "merger" in name) or not is_visual if meet else facts != is_visual)
        self._state.embedding.requires_grad_(facts)

    def _save(self) -> None:
        state, path = self._state, self._work / "state.pt"
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "model": state.model.state_dict(),
                "average": state.average.state_dict(),
                "teacher": state.teacher.state_dict(),
                "embedding": state.embedding.state_dict(),
                "history": state.history.state_dict(),
                "story": state.story.state_dict(),
                "clock": state.clock.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
                "step": state.step,
                "draw": state.draw,
            },
            partial,
        )
        partial.rename(path)
        published = copy.deepcopy(state.average)
        torch.nn.Module.to(published, "cpu", torch.bfloat16)
        write_checkpoint(self._work / "model", self._tokenizer, published)

    def _rate(self, seconds: float) -> float:
        """Share of the full learning rate: a plateau, a linear way down to nothing, and a warm-up of each lesson.

        The way down ends at the last step, or when a run of limited time ends if that comes first. Teachers that learn alone
        are linear layers and learn faster.
        """
        step, arguments = self._state.step, self._arguments
        if step < arguments.head_steps:
            return _HEAD_RATE
        left = max(arguments.steps - step, 0)
        if arguments.max_seconds is not None:
            left = min(left, arguments.steps * max(1 - seconds / arguments.max_seconds, 0.0))
        way_down = arguments.steps * arguments.decay_share
        starts = (0, arguments.head_steps, arguments.fact_steps, self._meet_step)
        since = step - max(start for start in starts if start <= step)
        return min((since + 1) / arguments.warm_up_steps, 1.0, left / max(way_down, 1))

    def _step(self, batch: Glimpses, scores: Scores) -> torch.Tensor:
        state, there = self._state, self._device
        self._watched.clear()
        self._recalled.clear()
        loss = torch.zeros((), device=there)
        with _fast_products(there):
            if isinstance(batch, Batch):
                logits, wanted = predict(state.model, batch, state.embedding, self._pool)
                loss = answer_loss(logits, wanted, batch.kinds)
                scores.add(logits.detach(), wanted, batch.kinds)
            else:
                watch(state.model, batch, self._pool)
        if isinstance(batch, Batch):
            early, late, last = (self._states_of(states).flatten(0, 1) for states in self._recalled)
            places, asked, ends = (x.to(there) for x in (batch.places, batch.asked, batch.ends))
            behind, known = state.history(early[places], late[places], batch.all_cells.history)
            aside, found = state.story(last[asked], batch.stories)
            meant, told = state.clock(early[ends], late[ends], batch.clocks)
            scores.see({**known, **found, **told})
            loss = loss + self._arguments.history_weight * (behind + meant) + self._arguments.story_weight * aside
        weight = self._arguments.teacher_weight if isinstance(batch, Batch) else 1.0
        if batch.rows and weight:
            loss = loss + weight * self._taught(batch, scores)
        loss.backward()
        groups = itertools.chain.from_iterable(optimizer.param_groups for optimizer in state.optimizers)
        parameters = [parameter for group in groups for parameter in group["params"]]
        _average_gradients(parameters, self._arguments.workers)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self._arguments.average_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            averages, values = state.average.parameters(), state.model.parameters()
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, 1 - decay)
        return loss.detach()

    @staticmethod
    def _states_of(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    def _taught(self, batch: Glimpses, scores: Scores) -> torch.Tensor:
        """How far the tower is from seeing what is there, and from saying it as the facts' embedding does."""
        state = self._state
        # Transformers encodes pictures before videos; watch() goes in the batch's order.
        kinds = sorted(batch.rows) if isinstance(batch, Batch) else list(batch.rows)
        losses, sizes = [], []
        for kind, features in zip(kinds, self._watched, strict=True):
            cells = batch.cells[kind]
            loss, seen = state.teacher(features, cells)
            far = distance(features, state.embedding.embed(cells), cells)
            losses.append((loss + far) * len(cells.colours))
            sizes.append(len(cells.colours))
            if kind == "video" or len(kinds) == 1:
                scores.see({**seen, "far": far.detach()})
        return torch.stack(losses).sum() / sum(sizes)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Shares of right answers of the averaged model, each token given those before it, on clips never trained on."""
        arguments = self._arguments
        pool = Pool(self._work / "val", arguments.device)
        held_out = Drawer(self._watcher, pool, min(arguments.max_tokens, _TOKENS_PER_DRAWN_BATCH), arguments.pair_share)
        scores = Scores()
        for draw in range(arguments.measure_draws):
            for batch in self._prompts(held_out, -1 - draw, self._state.step):
                with _fast_products(self._device):
                    logits, wanted = predict(self._state.average, batch, self._state.embedding, pool)
                scores.add(logits, wanted, batch.kinds)
        return scores.shares()

    def _lessons(self) -> Generator[tuple[Glimpses, int], None, None]:
        """Batches from where training stands on, and how many draws are used up when one is done.

        Each step has the lesson it has for all workers, wherever in a draw one of them is.
        """
        arguments, number, step = self._arguments, self._state.draw, self._state.step
        changes = (arguments.few_group_steps, arguments.fact_steps, self._meet_step)
        while True:
            for batch, used in self._batches(number, step):
                yield batch, used
                number = used
                step += 1
                if step in changes:
                    break

    def _batches(self, number: int, step: int) -> Iterator[tuple[Glimpses, int]]:
        """Batches of a step's lesson from draw ``number`` on, without end, made by other processes if there are any."""
        draws = _Draws(lambda draw: self._lesson(draw, step), self._drawer, number)
        if not self._arguments.loaders:
            return iter(draws)
        loader: Any = DataLoader(
            draws,
            batch_size=None,
            num_workers=self._arguments.loaders,
            prefetch_factor=_LOADED_AHEAD,
            multiprocessing_context="fork",
        )
        return iter(loader)

    def _lesson(self, number: int, step: int) -> Iterator[Glimpses]:
        worker_number = number * self._arguments.workers + self._number
        if self._arguments.fact_steps <= step < self._meet_step:
            return iter([self._drawer.glimpses(worker_number)])
        return self._prompts(self._drawer, worker_number, step)

    def _prompts(self, drawer: Drawer, number: int, step: int) -> Iterator[Batch]:
        """Of facts, few groups of frames at first, or of pixels."""
        if step >= self._arguments.fact_steps:
            return drawer.batches(number)
        max_groups = _FEW_GROUPS if step < self._arguments.few_group_steps else _MAX_GROUPS_OF_FACTS
        return drawer.fact_batches(number, max_groups)

    def _drawn(self) -> Generator[tuple[Glimpses, int], None, None]:
        """:meth:`_lessons`, made ahead in a thread, which ends with its processes when this is closed."""
        ready: queue.Queue[tuple[Glimpses, int] | Exception] = queue.Queue(_DRAWN_AHEAD)
        is_over = threading.Event()

        def hand_over(drawn: tuple[Glimpses, int] | Exception) -> None:
            while not is_over.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(drawn, timeout=0.1)
                    return

        def draw() -> None:
            try:
                with contextlib.closing(self._lessons()) as lessons:
                    for drawn in lessons:
                        hand_over(drawn)
                        if is_over.is_set():
                            return
            except Exception as error:  # goes to the loop that waits for a batch
                hand_over(error)

        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        try:
            while True:
                drawn = ready.get()
                if isinstance(drawn, Exception):
                    raise drawn
                yield drawn
        finally:
            is_over.set()
            thread.join()

    def _log(self, values: dict[str, Any]) -> None:
        with (self._work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self._state.step, **values}) + "\n")


def prepare_base(work: Path, start_from: str | None) -> None:
    """Put into ``work`` what training starts from: an untrained checkpoint, or a copy of a trained one."""
    if start_from is None:
        blank_checkpoint(work / "base")
    elif not (work / "base").exists():
        shutil.copytree(start_from, work / "base")


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(prog="python -m filmstrip.demo.train", description=__doc__)
    parser.add_argument("work", help="folder with the pool, the state and the log")
    parser.add_argument(
        "--start-from",
        metavar="CHECKPOINT",
        help="trained weights to go on from, with their tokenizer; without lessons apart (--fact-steps 0 --watch-steps 0)",
    )
    parser.add_argument("--steps", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--max-seconds", type=float, help="of this run; the learning rate is down by then (default: no limit)"
    )
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a batch, padded (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--optimizer",
        choices=("muon", "adamw"),
        default="muon" if cpu_has_bfloat16_units() else "adamw",
        help="of the matrices between layers; Muon computes in bfloat16 (default: %(default)s, as this CPU is)",
    )
    parser.add_argument("--device", default="cpu", help='"cuda" for a GPU, which holds the pool, too (default: cpu)')
    parser.add_argument("--loaders", type=int, default=0, help="processes that draw batches (default: a thread)")
    parser.add_argument(
        "--head-steps", type=int, default=0, help="at first, for the teachers alone, beside trained weights"
    )
    parser.add_argument("--warm-up-steps", type=int, default=100)
    parser.add_argument("--few-group-steps", type=int, default=1500, help="at first, few groups of frames at a time")
    parser.add_argument("--fact-steps", type=int, default=4000, help="at first, for the text model alone")
    parser.add_argument("--watch-steps", type=int, default=1500, help="then, for the vision tower alone")
    parser.add_argument("--teacher-weight", type=float, default=0.2, help="of the teacher's loss, later")
    parser.add_argument("--history-weight", type=float, default=0.3, help="of the loss on what earlier groups tell")
    parser.add_argument("--story-weight", type=float, default=0.3, help="of the loss on all that is told of a thing")
    parser.add_argument("--pair-share", type=float, default=0.3, help="of videos shown beside another one")
    parser.add_argument("--decay-share", type=float, default=0.25, help="of the steps, at the end")
    parser.add_argument("--average-decay", type=float, default=0.998)
    parser.add_argument("--log-steps", type=int, default=50)
    parser.add_argument("--measure-steps", type=int, default=1000)
    parser.add_argument("--measure-draws", type=int, default=3)
    parser.add_argument("--save-seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, help="processes of one thread (default: 3, one for a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.workers is None:
        arguments.workers = 3 if arguments.device == "cpu" else 1
    if arguments.workers > 1 and arguments.device != "cpu":
        parser.error("--workers: a GPU takes one worker")
    if arguments.max_seconds is not None and (arguments.workers > 1 or arguments.max_seconds <= 0):
        parser.error("--max-seconds: a positive number, and only with --workers 1, whose clocks cannot disagree")
    work = Path(arguments.work)
    prepare_base(work, arguments.start_from)
    (work / "pgid").write_text(f"{os.getpgid(0)}\n")
    # Tensors of many megabytes come and go in each step; kept memory spares the kernel to clear their pages each time.
    os.environ.update(_MALLOC_SETTINGS)
    (work / "meeting").unlink(missing_ok=True)
    spawn(_work, (arguments,), arguments.workers)


def _work(number: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if arguments.workers > 1:
        meeting = f"file://{Path(arguments.work, 'meeting').resolve()}"
        # Whoever stops the whole group for an hour must find it going on.
        forever = datetime.timedelta(days=365)
        distributed.init_process_group("gloo", meeting, forever, arguments.workers, number)
    Trainer(arguments, number).run()
    if arguments.workers > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
