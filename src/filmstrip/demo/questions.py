"""A scene and the times at which it is looked at in, questions with their one right answer out; knows no pixels, no model.

Questions about a time have two truths: what the scene says (``Question.seconds``), and what can be read from the prompt, the
time written beside the first frames that show it. A model is taught the second and measured against the first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from filmstrip.demo.scenes import COLOURS, DIGITS, DIRECTIONS, SHAPES, Scene, Thing

GRID = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""Names of the nine parts of a picture, by row and column."""

ORDINALS = ("first", "second")
_MAX_TRANSCRIBED_GROUPS = 14
_EDGE = 0.1
"""A place this near to the border between two parts of the grid (in parts) is not asked for."""


@dataclass(frozen=True)
class Question:
    """``seconds`` is the true time where the answer is one, to be met within a tolerance; else the words must be met."""

    kind: str
    text: str
    answer: str
    seconds: float | None = None
    thing: Thing | None = None
    """What it is about, for questions that follow."""
    listed: tuple[Thing, ...] = ()
    """What the answer's sentences are about, one after the other."""
    moment: str | None = None
    """Of the times that the prompt shows, the nearest to the one asked about."""
    found: tuple[bool, bool] | None = None
    """For each of two videos, whether what is asked for is in it."""


class View:
    """A scene as a model sees it: only at the sampled frames, in groups that carry one time each."""

    def __init__(self, scene: Scene, frame_seconds: Sequence[float], group_size: int = 2) -> None:
        """``frame_seconds`` are the real times of the sampled frames; the last one repeats until its group is full."""
        times = list(frame_seconds)
        times.extend(times[-1:] * (-len(times) % group_size))
        self.scene = scene
        self.groups = [times[start : start + group_size] for start in range(0, len(times), group_size)]
        self.labels = [f"{(group[0] + group[-1]) / 2:.1f}" for group in self.groups]
        # Asked for again and again; the scene keeps its things, so nothing else gets their identities.
        self._seen_groups = {id(thing): self._groups_with(thing) for thing in scene.things}
        seen = [thing for thing in scene.things if self.seen_groups(thing)]
        seen.sort(key=lambda thing: (self.seen_groups(thing)[0], thing.start[0]))
        self.shapes = [thing for thing in seen if not thing.is_digit]
        self.digits = [thing for thing in seen if thing.is_digit]

    @property
    def things(self) -> list[Thing]:
        """Everything seen, in the order of appearance."""
        return sorted([*self.shapes, *self.digits], key=lambda thing: (self.seen_groups(thing)[0], thing.start[0]))

    def seen_groups(self, thing: Thing) -> list[int]:
        """Numbers of the groups of which at least one frame shows ``thing``."""
        known = self._seen_groups.get(id(thing))
        return list(self._groups_with(thing) if known is None else known)

    def _groups_with(self, thing: Thing) -> list[int]:
        return [i for i, group in enumerate(self.groups) if any(thing.is_shown(t) for t in group)]

    def shown_times(self, thing: Thing) -> list[float]:
        """Times of the frames that show ``thing``."""
        return [t for group in self.groups for t in group if thing.is_shown(t)]

    def is_whole(self, thing: Thing) -> bool:
        """Whether enough of it is seen to tell how it moves: at least half of its way, in two frames or more."""
        times = self.shown_times(thing)
        return len(set(times)) > 1 and times[-1] - times[0] > 0.5 * (thing.vanishes_seconds - thing.appears_seconds)

    def appears(self, thing: Thing) -> str | None:
        """Label of the first group that shows it, None if it is there from the first frame on."""
        if thing.is_shown(self.groups[0][0]):
            return None
        return self.labels[self.seen_groups(thing)[0]]

    def vanishes(self, thing: Thing) -> str | None:
        """Label of the first group that lacks it in a frame after it was seen, None if it stays."""
        for group, label in zip(self.groups, self.labels, strict=True):
            if any(t >= thing.vanishes_seconds for t in group):
                return label
        return None

    def changes(self, thing: Thing) -> str | None:
        """Label of the first group with its later colour, None if the change is not seen."""
        times = self.shown_times(thing)
        if thing.later_colour is None or not times[0] < thing.changes_seconds <= times[-1]:
            return None
        return next(
            label
            for group, label in zip(self.groups, self.labels, strict=True)
            if any(t >= thing.changes_seconds for t in group)
        )

    def nearest_label(self, seconds: float) -> str:
        """Label of the group whose frames lie nearest to a time."""
        middles = [(group[0] + group[-1]) / 2 for group in self.groups]
        return self.labels[min(range(len(middles)), key=lambda number: abs(middles[number] - seconds))]

    def near(self, seconds: float) -> list[list[float]]:
        """The groups that a question about ``seconds`` may mean: all whose times lie about as near as the nearest."""
        middles = [(group[0] + group[-1]) / 2 for group in self.groups]
        nearest = min(abs(middle - seconds) for middle in middles)
        spacing = (middles[-1] - middles[0]) / max(len(middles) - 1, 1)
        reach = nearest if nearest < 0.051 else nearest + 0.5 * spacing
        return [g for g, middle in zip(self.groups, middles, strict=True) if abs(middle - seconds) <= reach + 1e-6]


def capitalized(text: str) -> str:
    """``text`` with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def a(noun: str) -> str:
    """``noun`` with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def grid_name(scene: Scene, x: float, y: float) -> str | None:
    """Part of the picture that holds a pixel, None if it is too near to another."""
    column, row = 3 * x / scene.width, 3 * y / scene.height
    for position in (column, row):
        if min(abs(position - 1), abs(position - 2)) < _EDGE:
            return None
    return GRID[min(int(row), 2)][min(int(column), 2)]


def motion_answer(thing: Thing) -> str:
    """How a thing moves, as an answer."""
    if thing.motion in DIRECTIONS:
        return capitalized(thing.motion)
    return {"still": "It stays still", "grow": "It grows", "shrink": "It shrinks"}[thing.motion]


def sentence(view: View, thing: Thing) -> str:
    """What a thing does, as one sentence of a description."""
    if thing.is_digit:
        return f"The digit {thing.shape} is shown."
    if thing.motion in DIRECTIONS:
        does = f"moves {thing.motion}"
    else:
        does = {"still": "stays still", "grow": "grows", "shrink": "shrinks"}[thing.motion]
    turn = f" and turns {thing.later_colour}" if view.changes(thing) else ""
    return f"{capitalized(a(f'{thing.colour} {thing.shape}'))} {does}{turn}."


def ask(kind: str, view: View, rng: random.Random, *, thing: Thing | None = None, ref: str = "") -> Question | None:
    """A question of ``kind`` about a video, or None if the video gives no occasion for it.

    ``thing`` and ``ref`` ("it") let a question of a conversation go on about what the last one was about.
    """
    if kind in _ABOUT_THINGS:
        candidates = [thing] if thing is not None else view.shapes
        if not candidates:
            return None
        chosen = rng.choice(candidates)
        return _ABOUT_THINGS[kind](view, rng, chosen, ref or _reference(view, chosen, rng))
    return _ABOUT_VIDEO[kind](view, rng)


def ask_some(view: View, rng: random.Random, num_questions: int, weights: dict[str, float]) -> list[Question]:
    """Different questions about a video, kinds drawn by ``weights``; fewer where the video gives no occasion for more."""
    questions: dict[str, Question] = {}
    kinds, chances = list(weights), list(weights.values())
    for _ in range(4 * num_questions):
        question = ask(rng.choices(kinds, chances)[0], view, rng)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == num_questions:
            break
    return list(questions.values())


def ask_in_turn(view: View, rng: random.Random, num_questions: int) -> list[Question]:
    """A conversation about one thing: the first question names it, the others say "it"."""
    things = [thing for thing in view.shapes if view.is_whole(thing)]
    if not things:
        return []
    thing = rng.choice(things)
    kinds = rng.sample(list(_ABOUT_THINGS), len(_ABOUT_THINGS))
    questions: list[Question] = []
    for kind in kinds:
        question = ask(kind, view, rng, thing=thing, ref="it" if questions else "")
        if question is not None and not (questions and kind in ("colour", "shape", "first")):
            questions.append(question)
        if len(questions) == num_questions:
            break
    return questions


def ask_of_two(views: tuple[View, View], rng: random.Random) -> Question | None:
    """A question that needs both videos, or one that names the video it is about."""
    return rng.choices((_which_shows, _which_moves, _which_digit, _which_is_longer, _about_one), (5, 4, 2, 2, 3))[0](
        views, rng
    )


def ask_of_picture(picture: Scene, view: View | None, rng: random.Random) -> Question | None:
    """A question about a picture of one thing, or (with a video) about both."""
    shown = picture.things[0]
    if view is None or rng.random() < 0.25:
        return _about_picture(shown, rng)
    same = next((t for t in view.shapes if (t.shape, t.colour) == (shown.shape, shown.colour)), None)
    it = rng.choice(("the shape in the picture", "the shape from the picture", "the thing in the picture"))
    roll = rng.random()
    if same is None or roll < 0.4:
        text = rng.choice(
            (f"Does {it} appear in the video?", f"Is {it} in the video, too?", f"Does the video show {it}?")
        )
        return Question("picture_and_video", text, "No" if same is None else "Yes", thing=same)
    if roll < 0.7:
        question = _direction(view, rng, same, it)
    else:
        question = _appears(view, rng, same, it)
    if question is None:
        return None
    return Question("picture_and_video", question.text, question.answer, question.seconds, question.thing)


def transcribe(view: View) -> Question | None:
    """What is seen beside each time and where, if there are not too many times to say it.

    A small model that learns from short answers alone finds no way from a time to what is seen then, nor back, for
    thousands of steps; one long answer of many such pairs shows it.
    """
    if len(view.groups) > _MAX_TRANSCRIBED_GROUPS:
        return None
    lines = []
    for label, group in zip(view.labels, view.groups, strict=True):
        seen = [_seen_at(view, thing, group) for thing in view.things if any(thing.is_shown(t) for t in group)]
        lines.append(f"{label}: {', '.join(seen) or 'nothing'}.")
    return Question("transcribe", "List what is seen at each time.", " ".join(lines))


def list_looks(view: View) -> Question | None:
    """The shapes with their colours, shape first."""
    if not view.shapes:
        return None
    looks = [
        f"{capitalized(thing.shape)}: {thing.colour}" + (f", then {thing.later_colour}" if view.changes(thing) else "")
        for thing in view.shapes
    ]
    text = "List the shapes with their colours."
    return Question("list_looks", text, f"{'. '.join(looks)}.", listed=tuple(view.shapes))


def _seen_at(view: View, thing: Thing, group: Sequence[float]) -> str:
    if thing.is_digit:
        return f"digit {thing.shape}"
    seconds = next(t for t in group if thing.is_shown(t))
    x, y, _ = thing.place(seconds)
    row, column = (min(int(3 * share), 2) for share in (y / view.scene.height, x / view.scene.width))
    return f"{thing.colour_at(seconds)} {thing.shape} {GRID[row][column]}"


def is_right(question: Question, answer: str, *, tolerance_seconds: float = 0.5) -> bool:
    """Whether ``answer`` is right: a time within the tolerance of the truth, else the words, whatever their case."""
    said, wanted = (text.strip().rstrip(".").lower() for text in (answer, question.answer))
    if question.kind == "describe":
        return sorted(said.split(". ")) == sorted(wanted.split(". "))
    if question.seconds is None or said == wanted:
        return said == wanted
    words = said.split()
    if len(words) != 3 or words[0] != "at" or words[2] != "seconds":
        return False
    try:
        return abs(float(words[1]) - question.seconds) <= tolerance_seconds
    except ValueError:
        return False


def _reference(view: View, thing: Thing, rng: random.Random) -> str:
    """Words that mean ``thing`` and nothing else seen.

    Colours tell all things apart, shapes only some: told both, a model learns to go by the colour alone.
    """
    names = [f"the {thing.colour} {thing.shape}"]
    if sum(other.shape == thing.shape for other in view.shapes) == 1:
        names += [f"the {thing.shape}"] * 2
    names.append(f"the {thing.colour} shape")
    if len(view.shapes) == 1:
        names.append("the shape")
    return rng.choice(names)


def _describe(view: View, rng: random.Random) -> Question | None:
    if not view.things or not all(view.is_whole(thing) for thing in view.shapes):
        return None
    text = rng.choice(
        (
            "Describe the video.",
            "What happens in this video?",
            "What happens in the video?",
            "What do you see in the video?",
            "Describe what happens.",
            "What can be seen?",
        )
    )
    return Question(
        "describe", text, " ".join(sentence(view, thing) for thing in view.things), listed=tuple(view.things)
    )


def _count(view: View, rng: random.Random) -> Question | None:
    text = rng.choice(
        (
            "How many shapes are there?",
            "How many shapes does the video show?",
            "Count the shapes.",
            "How many shapes appear?",
        )
    )
    return Question("count", text, str(len(view.shapes)))


def _exists(view: View, rng: random.Random) -> Question | None:
    first_colours = {(thing.colour, thing.shape) for thing in view.shapes}
    all_looks = first_colours | {(thing.later_colour, thing.shape) for thing in view.shapes}
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    if view.shapes and rng.random() < 0.75:
        thing = rng.choice(view.shapes)
        colour, shape = thing.colour, thing.shape
        if rng.random() < 0.4:
            colour, shape = (colour, rng.choice(SHAPES)) if rng.random() < 0.5 else (rng.choice(list(COLOURS)), shape)
    if (colour, shape) in all_looks and (colour, shape) not in first_colours:
        return None
    noun = a(f"{colour} {shape}")
    text = rng.choice((f"Is there {noun}?", f"Does the video show {noun}?", f"Can you see {noun} in the video?"))
    found = next((thing for thing in view.shapes if (thing.colour, thing.shape) == (colour, shape)), None)
    return Question("exists", text, "No" if found is None else "Yes", thing=found)


def _digit(view: View, rng: random.Random) -> Question | None:
    if not view.digits:
        return None
    names = ", ".join(thing.shape for thing in view.digits)
    plural = len(view.digits) > 1
    text = rng.choice(
        ("Which digits are shown?", "Which digits appear in the video?", "Read the digits.")
        if plural
        else (
            "Which digit is shown?",
            "Which digit appears in the video?",
            "What number do you see?",
            "Read the digit.",
        )
    )
    return Question("digit", text, names, listed=tuple(view.digits))


def _digit_at(view: View, rng: random.Random) -> Question | None:
    if not view.digits:
        return None
    seconds = _some_time(view, rng, 0.0, view.groups[-1][-1])
    shown = {_digit_shown(view, t) for group in view.near(float(seconds)) for t in group}
    if len(shown) != 1:
        return None
    (thing,) = shown
    text = rng.choice(
        (
            f"Which digit is shown at {seconds} seconds?",
            f"What digit can be seen at {seconds} seconds?",
            f"Which number is there at {seconds} seconds?",
        )
    )
    moment = view.nearest_label(float(seconds))
    return Question("digit_at", text, "None" if thing is None else thing.shape, thing=thing, moment=moment)


def _digit_shown(view: View, seconds: float) -> Thing | None:
    return next((thing for thing in view.digits if thing.is_shown(seconds)), None)


def _digit_when(view: View, rng: random.Random) -> Question | None:
    if not view.digits:
        return None
    thing = rng.choice(view.digits)
    return _appears(view, rng, thing, f"the digit {thing.shape}")


def _first(view: View, rng: random.Random) -> Question | None:
    if len(view.shapes) < 2:
        return None
    if rng.random() < 0.5:
        return _first_event(view, rng)
    last = rng.random() < 0.35
    starts = [view.seen_groups(thing)[0] for thing in view.shapes]
    edge = max(starts) if last else min(starts)
    if starts.count(edge) > 1:
        return None
    thing = view.shapes[starts.index(edge)]
    word = "last" if last else "first"
    text = rng.choice((f"Which shape appears {word}?", f"What appears {word}?", f"Which shape comes {word}?"))
    return Question("first", text, f"The {thing.colour} {thing.shape}", thing=thing)


def _first_event(view: View, rng: random.Random) -> Question | None:
    events: list[tuple[float, str]] = []
    for thing in view.shapes:
        name = f"the {thing.colour} {thing.shape}"
        happenings = (
            (view.appears(thing), f"{name} appears"),
            (view.vanishes(thing), f"{name} vanishes"),
            (view.changes(thing), f"{name} turns {thing.later_colour}"),
        )
        events.extend((float(label), words) for label, words in happenings if label is not None)
    if len(events) < 2:
        return None
    one, other = rng.sample(events, 2)
    if one[0] == other[0]:
        return None
    text = rng.choice(("What happens first: {} or {}?", "Which comes first, {} or {}?")).format(one[1], other[1])
    return Question("first", text, capitalized(min(one, other)[1]))


def _colour(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    if sum(other.shape == thing.shape for other in view.shapes) > 1:
        return None
    ref = ref if ref in ("it", "the shape") else f"the {thing.shape}"
    colour = rng.choice(("colour", "color"))
    if thing.later_colour is None:
        text = rng.choice((f"What {colour} is {ref}?", f"Which {colour} is {ref}?", f"Which {colour} does {ref} have?"))
        return Question("colour", text, capitalized(thing.colour), thing=thing)
    if view.changes(thing) is None:
        return None
    if rng.random() < 0.4:
        text = rng.choice((f"What {colour} is {ref} at first?", f"What {colour} does {ref} have at the start?"))
        return Question("colour", text, capitalized(thing.colour), thing=thing)
    text = rng.choice(
        (f"What {colour} is {ref} at the end?", f"What {colour} does {ref} turn?", f"Which {colour} does {ref} become?")
    )
    return Question("colour", text, capitalized(thing.later_colour), thing=thing)


def _shape(_: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    name = f"the {thing.colour} shape"
    text = rng.choice((f"Which shape is {thing.colour}?", f"What is {name}?", f"Which shape does {name} have?"))
    if ref == "the shape":
        text = rng.choice(("Which shape is it?", "What shape is shown?", "What kind of shape is it?", text))
    return Question("shape", text, capitalized(thing.shape), thing=thing)


def _direction(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    if not view.is_whole(thing):
        return None
    text = rng.choice(
        (
            f"Which way does {ref} move?",
            f"In which direction does {ref} move?",
            f"How does {ref} move?",
            f"Where does {ref} go?",
            f"What does {ref} do?",
        )
    )
    return Question("direction", text, motion_answer(thing), thing=thing)


def _appears(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    label = view.appears(thing)
    if label is None and rng.random() < 0.6:
        return None
    text = rng.choice(
        (
            f"When does {ref} appear?",
            f"At what time does {ref} appear?",
            f"When does {ref} show up?",
            f"At which second does {ref} appear?",
        )
    )
    if label is None:
        return Question("when", text, "From the start", thing=thing)
    return Question("when", text, f"At {label} seconds", thing.appears_seconds, thing=thing)


def _vanishes(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    label = view.vanishes(thing)
    if label is None and rng.random() < 0.6:
        return None
    text = rng.choice((f"When does {ref} vanish?", f"When does {ref} disappear?", f"At what time does {ref} vanish?"))
    if label is None:
        return Question("when", text, "It stays to the end", thing=thing)
    return Question("when", text, f"At {label} seconds", thing.vanishes_seconds, thing=thing)


def _changes(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    label = view.changes(thing)
    if label is None:
        return None
    turned = rng.choice((f"turn {thing.later_colour}", "change its colour", "change its color"))
    text = rng.choice((f"When does {ref} {turned}?", f"At what time does {ref} {turned}?"))
    return Question("when", text, f"At {label} seconds", thing.changes_seconds, thing=thing)


def _where_at(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    times = view.shown_times(thing)
    seconds = _some_time(view, rng, times[0], times[-1])
    places: set[str | None] = set()
    for group in view.near(float(seconds)):
        for t in group:
            places.add(_grid_of(view, thing, t) if thing.is_shown(t) else None)
    if len(places) != 1 or None in places:
        return None
    text = rng.choice(
        (
            f"Where is {ref} at {seconds} seconds?",
            f"At {seconds} seconds, where is {ref}?",
            f"Where in the picture is {ref} at {seconds} seconds?",
        )
    )
    moment = view.nearest_label(float(seconds))
    return Question("where_at", text, capitalized(places.pop() or ""), thing=thing, moment=moment)


def _where_starts(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    return _where_edge(view, thing, 0, rng.choice((f"Where is {ref} at first?", f"Where does {ref} start?")))


def _where_ends(view: View, rng: random.Random, thing: Thing, ref: str) -> Question | None:
    return _where_edge(view, thing, -1, rng.choice((f"Where is {ref} at last?", f"Where does {ref} end up?")))


def _where_edge(view: View, thing: Thing, which: int, text: str) -> Question | None:
    name = _grid_of(view, thing, view.shown_times(thing)[which])
    return None if name is None else Question("where_edge", text, capitalized(name), thing=thing)


def _grid_of(view: View, thing: Thing, seconds: float) -> str | None:
    x, y, _ = thing.place(seconds)
    return grid_name(view.scene, x, y)


def _some_time(view: View, rng: random.Random, low: float, high: float) -> str:
    """A time between the two as a question says it: half of them are times that the prompt shows."""
    labels = [label for label in view.labels if low - 0.05 <= float(label) <= high + 0.05]
    if labels and rng.random() < 0.5:
        return rng.choice(labels)
    return f"{rng.uniform(low, high):.1f}"


def _which(views: tuple[View, View], text: str, is_meant: Callable[[Thing], bool]) -> Question:
    answers = {
        (True, False): "The first video",
        (False, True): "The second video",
        (True, True): "Both videos",
        (False, False): "Neither video",
    }
    found = [[thing for thing in view.things if is_meant(thing)] for view in views]
    things = [*found[0], *found[1]]
    are_there = (bool(found[0]), bool(found[1]))
    thing = things[0] if len(things) == 1 else None
    return Question("compare", text, answers[are_there], thing=thing, found=are_there)


def _which_shows(views: tuple[View, View], rng: random.Random) -> Question | None:
    shapes = [*views[0].shapes, *views[1].shapes]
    if not shapes:
        return None
    thing = rng.choice(shapes)
    colour, shape = thing.colour, thing.shape
    if rng.random() < 0.15:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    if any(other.later_colour == colour and other.shape == shape for other in shapes):
        return None
    noun = a(f"{colour} {shape}")
    text = rng.choice(
        (f"Which video shows {noun}?", f"In which video is there {noun}?", f"Which of the two videos has {noun}?")
    )
    return _which(views, text, lambda other: (other.colour, other.shape) == (colour, shape))


def _which_moves(views: tuple[View, View], rng: random.Random) -> Question | None:
    shapes = [*views[0].shapes, *views[1].shapes]
    if not shapes or not all(view.is_whole(thing) for view in views for thing in view.shapes):
        return None
    motion = rng.choice([thing.motion for thing in shapes])
    does = {"still": "stay still", "grow": "grow", "shrink": "shrink"}.get(motion, f"move {motion}")
    text = rng.choice((f"In which video does a shape {does}?", f"In which of the videos does something {does}?"))
    return _which(views, text, lambda thing: not thing.is_digit and thing.motion == motion)


def _which_digit(views: tuple[View, View], rng: random.Random) -> Question | None:
    digits = [thing.shape for view in views for thing in view.digits]
    if not digits:
        return None
    digit = rng.choice(digits) if rng.random() < 0.85 else rng.choice(DIGITS)
    text = rng.choice((f"Which video shows the digit {digit}?", f"In which video can you see the digit {digit}?"))
    return _which(views, text, lambda thing: thing.shape == digit)


def _which_is_longer(views: tuple[View, View], rng: random.Random) -> Question | None:
    ends = [float(view.labels[-1]) for view in views]
    if abs(ends[0] - ends[1]) < 1.0:
        return None
    longer = rng.random() < 0.6
    first = (ends[0] > ends[1]) == longer
    text = rng.choice(("Which video is {}?", "Which of the two videos is {}?")).format(
        "longer" if longer else "shorter"
    )
    return Question("compare", text, "The first video" if first else "The second video")


def _about_one(views: tuple[View, View], rng: random.Random) -> Question | None:
    number = rng.randrange(2)
    kind = rng.choice(("colour", "shape", "direction", "appears", "count", "digit", "where_starts"))
    question = ask(kind, views[number], rng)
    if question is None:
        return None
    text = question.text.replace(" in the video", "").replace("does the video show", "are there")
    text = f"In the {ORDINALS[number]} video, {text[0].lower()}{text[1:-1]}?"
    return Question("compare", text, question.answer, question.seconds, question.thing)


def _about_picture(shown: Thing, rng: random.Random) -> Question:
    colour = rng.choice(("colour", "color"))
    noun = f"{shown.colour} {shown.shape}"
    text, answer = rng.choice(
        (
            (f"What {colour} is the shape in the picture?", shown.colour),
            (f"Which {colour} does the shape in the picture have?", shown.colour),
            ("Which shape is in the picture?", shown.shape),
            ("What shape does the picture show?", shown.shape),
            ("What is in the picture?", a(noun)),
            ("Describe the picture.", a(noun)),
            ("What does the picture show?", a(noun)),
        )
    )
    return Question("picture", text, capitalized(answer))


_ABOUT_VIDEO: dict[str, Callable[[View, random.Random], Question | None]] = {
    "describe": _describe,
    "count": _count,
    "exists": _exists,
    "digit": _digit,
    "digit_at": _digit_at,
    "digit_when": _digit_when,
    "first": _first,
}

_ABOUT_THINGS: dict[str, Callable[[View, random.Random, Thing, str], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "direction": _direction,
    "appears": _appears,
    "vanishes": _vanishes,
    "changes": _changes,
    "where_at": _where_at,
    "where_starts": _where_starts,
    "where_ends": _where_ends,
}

WEIGHTS: dict[str, float] = {
    "describe": 1.0,
    "count": 1.0,
    "exists": 2.0,
    "digit": 1.5,
    "digit_at": 5.0,
    "digit_when": 1.5,
    "first": 2.0,
    "colour": 3.0,
    "shape": 1.5,
    "direction": 3.0,
    "appears": 2.0,
    "vanishes": 1.0,
    "changes": 1.0,
    "where_at": 2.5,
    "where_starts": 1.0,
    "where_ends": 1.0,
}
"""How often each kind is asked in training."""
