"""A served model and held-out seeds in, a table of right answers by kind of question out, all through files and HTTP.

Every clip is encoded to a file of its own and asked about over ``/v1/chat/completions``, as any client would. Ablations show
that the answers come from watching: the same questions are asked about clips from which just one thing was taken.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filmstrip.demo.clips import encode_frames, encode_picture, encode_scene
from filmstrip.demo.questions import Question, View, ask, ask_in_turn, ask_of_picture, ask_of_two, is_right
from filmstrip.demo.scenes import Painter, Scene, make_picture_scene, make_scene, picture_of
from filmstrip.demo.serving import Client, image, video, words_of

FIRST_SEED = 2_000_000_000
"""Seeds for measuring: far from those of training, and from those looked at while training."""

ABLATIONS = ("other clip", "frames shuffled", "frames reversed", "frames repeated", "times squeezed")

_KINDS = (
    *("describe", "count", "exists", "digit", "digit_at", "digit_when", "first", "colour", "shape", "direction"),
    *("appears", "vanishes", "changes", "where_at", "where_starts", "where_ends"),
)
_SQUEEZED_RATE = 20_000
_NUM_CLIENTS = 4


@dataclass
class Table:
    """Answers counted by kind, and some of the wrong ones."""

    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wrong: list[dict[str, str]] = field(default_factory=list)

    def add(self, question: Question, answer: str, clip: str) -> None:
        """Count an answer."""
        self.asked[question.kind] += 1
        if is_right(question, answer):
            self.right[question.kind] += 1
        else:
            self.wrong.append(
                {
                    "clip": clip,
                    "kind": question.kind,
                    "question": question.text,
                    "wanted": question.answer,
                    "said": answer,
                }
            )

    def share(self, *kinds: str) -> float:
        """Share of right answers, of some kinds or of all."""
        chosen = kinds or tuple(self.asked)
        asked = sum(self.asked[kind] for kind in chosen)
        return sum(self.right[kind] for kind in chosen) / asked if asked else 0.0

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        kinds = {kind: {"asked": self.asked[kind], "right": round(self.share(kind), 4)} for kind in sorted(self.asked)}
        return {"asked": sum(self.asked.values()), "right": round(self.share(), 4), "kinds": kinds}


class FolderClient(Client):
    """Asks one server about files in one folder that it may read."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url)
        self._folder = folder

    def put(self, name: str, data: bytes) -> str:
        """Write a file and return its address."""
        path = self._folder / name
        path.write_bytes(data)
        return path.resolve().as_uri()


def measure_clip(client: FolderClient, seed: int, table: Table, num_questions: int) -> None:
    """Ask about the clip of ``seed``: alone, in turn, beside another and with a picture."""
    rng = random.Random(f"measure {seed}")
    view, part = _served(client, make_scene(seed))
    for question in _questions(view, rng, num_questions):
        table.add(question, client.answer([part], question.text), f"{seed}")
    turns: list[tuple[str, str]] = []
    for number, question in enumerate(ask_in_turn(view, rng, 3)):
        answer = client.answer([part], question.text, turns)
        if number:
            table.add(_renamed(question, "in turn"), answer, f"{seed}")
        turns.append((question.text, answer))
    if seed % 2 == 0:
        other_view, other_part = _served(client, make_scene(seed + 500_000_000))
        for _ in range(2):
            question = ask_of_two((view, other_view), rng)
            if question is not None:
                table.add(question, client.answer([part, other_part], question.text), f"{seed}")
    else:
        of_shown = bool(view.shapes) and rng.random() < 0.6
        picture = picture_of(view.shapes[0], seed) if of_shown else make_picture_scene(seed)
        shown = image(client.put(f"{seed}.picture", encode_picture(picture)))
        for question in (ask_of_picture(picture, None, rng), ask_of_picture(picture, view, rng)):
            if question is not None:
                parts = [shown] if question.kind == "picture" else [shown, part]
                table.add(question, client.answer(parts, question.text), f"{seed}")


def measure_ablations(client: FolderClient, seed: int, tables: dict[str, Table]) -> None:
    """Ask about times and directions of the clip of ``seed``, whole and with something taken from it."""
    rng = random.Random(f"ablate {seed}")
    scene = make_scene(seed)
    view, part = _served(client, scene)
    kinds = ("direction", "direction", "appears", "vanishes", "changes", "digit_at", "where_at", "first")
    asked = {question.text: question for kind in kinds if (question := ask(kind, view, rng)) is not None}
    questions = [question for question in asked.values() if not _is_answered_by_absence(question)]
    if not questions:
        return
    parts = {"none": part}
    for name, make in _ABLATED.items():
        parts[name] = video(client.put(f"{seed}.{name.replace(' ', '-')}.video", make(scene, view, rng)))
    num_frames = sum(len(group) for group in view.groups)
    for name, ablated in parts.items():
        # Squeezed to milliseconds, a clip would be sampled at fewer frames by the model's own rule.
        sampled: dict[str, Any] = {}
        if name == "times squeezed":
            sampled = {"media_io_kwargs": {"video": {"num_frames": num_frames}}}
        for question in questions:
            response = client.ask([ablated], question.text, **sampled)
            tables[name].add(question, words_of(response), f"{seed} {name}")


def _is_answered_by_absence(question: Question) -> bool:
    """Whether its answer is that nothing happens, which a clip without what was taken from it tells, too."""
    return (question.kind == "when" and question.seconds is None) or question.answer == "It stays still"


def _served(client: FolderClient, scene: Scene) -> tuple[View, dict[str, Any]]:
    part = video(client.put(f"{scene.seed}.video", encode_scene(scene)))
    return View(scene, client.times(part)), part


def _questions(view: View, rng: random.Random, num_questions: int) -> list[Question]:
    """One question of each of several kinds, drawn evenly."""
    questions: list[Question] = []
    for kind in rng.sample(_KINDS, len(_KINDS)):
        question = ask(kind, view, rng)
        if question is not None and len(questions) < num_questions:
            questions.append(question)
    return questions


def _renamed(question: Question, kind: str) -> Question:
    return Question(kind, question.text, question.answer, question.seconds, question.thing)


def _shuffled(scene: Scene, _: View, rng: random.Random) -> bytes:
    return encode_scene(scene, frame_order=rng.sample(range(scene.num_frames), scene.num_frames))


def _reversed(scene: Scene, _: View, __: random.Random) -> bytes:
    return encode_scene(scene, frame_order=range(scene.num_frames - 1, -1, -1))


def _repeated(scene: Scene, _: View, __: random.Random) -> bytes:
    """The frame that shows most, all the time."""
    shown = [sum(t.is_shown(i / scene.frames_per_second) for t in scene.things) for i in range(scene.num_frames)]
    return encode_scene(scene, frame_order=[shown.index(max(shown))] * scene.num_frames)


def _squeezed(scene: Scene, _: View, __: random.Random) -> bytes:
    """All frames in order, but so fast that every time beside them reads 0.0 seconds."""
    painter = Painter(scene)
    return encode_frames([painter.frame(i) for i in range(scene.num_frames)], _SQUEEZED_RATE, "h264", 23)


def _other(scene: Scene, _: View, __: random.Random) -> bytes:
    return encode_scene(make_scene(scene.seed + 700_000_000))


_ABLATED: dict[str, Callable[[Scene, View, random.Random], bytes]] = dict(
    zip(ABLATIONS, (_other, _shuffled, _reversed, _repeated, _squeezed), strict=True)
)


def evaluate(
    url: str, folder: Path, *, num_clips: int, questions_per_clip: int = 4, first_seed: int = FIRST_SEED
) -> Table:
    """Ask the server about ``num_clips`` clips written to ``folder``, which it must be allowed to read."""
    client, table = FolderClient(url, folder), Table()
    with ThreadPoolExecutor(_NUM_CLIENTS) as clients:
        seeds = range(first_seed, first_seed + num_clips)
        list(clients.map(lambda seed: measure_clip(client, seed, table, questions_per_clip), seeds))
    return table


def evaluate_ablations(url: str, folder: Path, *, num_clips: int, first_seed: int = FIRST_SEED) -> dict[str, Table]:
    """Tables of questions about times and directions by what was taken from the clips; "none" is the whole clip."""
    client = FolderClient(url, folder)
    tables = {name: Table() for name in ("none", *ABLATIONS)}
    with ThreadPoolExecutor(_NUM_CLIENTS) as clients:
        seeds = range(first_seed, first_seed + num_clips)
        list(clients.map(lambda seed: measure_ablations(client, seed, tables), seeds))
    return tables
