"""A scene's facts in, what each visual token should know out, and how far a vision tower is from it; knows no language.

Answers alone teach slowly: a few words per clip must shape every weight of the vision tower, and a text model that gets
blurred features finds no way to bind them for thousands of steps. So each half learns by itself first. The text model reads
facts, one linear layer away, where it will read features later (:class:`FactEmbedding`). The teacher asks each merged token
of the tower for what lies in its cell: colour, shape, in which of its group's frames it is shown, and where its centre is in
both; and the tower learns to say it in the words that the text model knows already. Both layers are used in training only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from filmstrip.demo.questions import Question, View
from filmstrip.demo.scenes import COLOURS, DIGITS, SHAPES, Scene, Thing

_COLOURS = ("none", *COLOURS)
_SHAPES = ("none", *SHAPES, *DIGITS)
_MARGIN_PIXELS = 8
_EMPTY_WEIGHT = 0.2
_NUM_FRAMES = 2
_SIZES = (len(_COLOURS), len(_SHAPES), _NUM_FRAMES, 2 * _NUM_FRAMES, 2 * _NUM_FRAMES, _NUM_FRAMES)
NUM_FACTS = sum(_SIZES)
"""Of a cell, one-hot classes counted one by one."""
_EMBEDDING_STD = 0.05
_NUM_TENTHS = 250
_NUM_RANKS = 4
_NUM_MEDIA = 2
_HISTORY_SIZES = {
    "early": (_NUM_TENTHS, _NUM_MEDIA, 1),
    "late": (_NUM_TENTHS, _NUM_RANKS, len(_COLOURS), 2, 3),
}
_NOT_ASKED = -100
_NEVER = _NUM_TENTHS
_CLOCK_SIZES = {"early": (_NUM_TENTHS,), "late": (len(_SHAPES), _NUM_TENTHS, _NUM_TENTHS, 2, 2, 2)}
_STORY_SIZES = (*[_NUM_TENTHS + 1] * 3, len(_COLOURS), len(_SHAPES), len(_COLOURS), _NUM_MEDIA, 7)
_CELL_ARRAYS = ("colours", "shapes", "shown", "places", "spots", "extents")


@dataclass
class Cells:
    """Facts of every merged token, in the tokens' order.

    ``colours`` and ``shapes`` are class numbers (num_tokens,), 0 for an empty cell; ``shown`` (num_tokens, 2) says in
    which frames of the group; ``places`` (num_tokens, 4) are x and y of the centre in both frames, from the cell's middle,
    in cells; ``spots`` (num_tokens, 4) the same from the picture's middle, -1 to 1 from edge to edge; ``extents``
    (num_tokens, 2) are half the sides in both frames, in cells.
    """

    colours: np.ndarray
    shapes: np.ndarray
    shown: np.ndarray
    places: np.ndarray
    spots: np.ndarray
    extents: np.ndarray
    history: History

    def table(self) -> np.ndarray:
        """All facts as numbers, classes one-hot: (num_tokens, NUM_FACTS), float32."""
        columns = (
            *(np.eye(len(_COLOURS))[self.colours], np.eye(len(_SHAPES))[self.shapes]),
            *(self.shown, self.places, self.spots, self.extents),
        )
        return np.concatenate(columns, axis=1).astype(np.float32)

    @staticmethod
    def join(parts: list[Cells]) -> Cells:
        """Facts of several items, one after the other."""
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _CELL_ARRAYS}
        return Cells(**arrays, history=History.join([part.history for part in parts]))

    def keep(self, is_kept: np.ndarray) -> Cells:
        """The cells where ``is_kept`` (num_tokens,) is true."""
        arrays = {name: getattr(self, name)[is_kept] for name in _CELL_ARRAYS}
        return Cells(**arrays, history=self.history.keep(is_kept))


@dataclass
class History:
    """What a merged token can only know from groups before its own; class numbers, -100 where there is nothing to know.

    ``tenths`` (num_tokens,) is the time beside its group, in tenths of a second; ``media`` the number of its video. Of the
    thing in the cell: ``is_first`` whether this group is the first with it, ``first_tenths`` that group's time, ``ranks``
    how many things of its sort came in earlier groups, ``first_colours``, ``starts`` (num_tokens, 2) where it was at first,
    from the picture's middle, and ``moved`` (num_tokens, 3) how far it came since, in the same measure, and the logarithm
    of how many times larger it became.
    """

    tenths: np.ndarray
    media: np.ndarray
    is_first: np.ndarray
    first_tenths: np.ndarray
    ranks: np.ndarray
    first_colours: np.ndarray
    starts: np.ndarray
    moved: np.ndarray

    @staticmethod
    def blank(shape: tuple[int, ...]) -> History:
        """Nothing to know."""
        names = ("tenths", "media", "is_first", "first_tenths", "ranks", "first_colours")
        classes = {name: np.full(shape, _NOT_ASKED) for name in names}
        return History(**classes, starts=np.zeros((*shape, 2)), moved=np.zeros((*shape, 3)))

    @staticmethod
    def join(parts: list[History]) -> History:
        """Of several items, one after the other."""
        return History(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})

    def keep(self, is_kept: np.ndarray) -> History:
        """Of the cells where ``is_kept`` (num_tokens,) is true."""
        return History(**{name: values[is_kept] for name, values in vars(self).items()})

    def flat(self) -> History:
        """One row for each token."""
        num_tokens = self.tenths.size
        return History(**{name: values.reshape(num_tokens, *values.shape[3:]) for name, values in vars(self).items()})

    def note(self, number: int, here: np.ndarray, thing: Thing, view: View) -> None:
        """Write down what the cells ``here`` of group ``number`` can know of ``thing``."""
        first = view.seen_groups(thing)[0]
        began, now = ([t for t in view.groups[group] if thing.is_shown(t)] for group in (first, number))
        x, y, size = thing.place(began[0])
        later_x, later_y, later_size = thing.place(now[-1])
        across, down = 2 / view.scene.width, 2 / view.scene.height
        same_sort = view.digits if thing.is_digit else view.shapes
        self.is_first[number][here] = first == number
        self.first_tenths[number][here] = _tenths(view.labels[first])
        self.ranks[number][here] = min(sum(view.seen_groups(other)[0] < first for other in same_sort), _NUM_RANKS - 1)
        self.first_colours[number][here] = _COLOURS.index(thing.colour_at(began[-1]))
        self.starts[number][here] = (x * across - 1, y * down - 1)
        self.moved[number][here] = ((later_x - x) * across, (later_y - y) * down, np.log(later_size / size))


def _tenths(label: str) -> int:
    tenths = round(float(label) * 10)
    return tenths if tenths < _NUM_TENTHS else _NOT_ASKED


@dataclass
class Stories:
    """All that a clip tells of the things that questions are about, one row for each; class numbers as in :class:`History`.

    ``times`` (num_things, 3) are tenths of a second of the groups in which it appears, vanishes and changes its colour;
    ``looks`` (num_things, 4) its first colour, its shape, its later colour, 0 for none, and its video's number; ``ways``
    (num_things, 7) where it is at first and at last, how far it came in between, and the logarithm of how many times larger
    it became.
    """

    times: np.ndarray
    looks: np.ndarray
    ways: np.ndarray

    @staticmethod
    def of(things: list[tuple[Thing, View, int]]) -> Stories:
        """Of things, the videos that they are seen in, and those videos' numbers from 0."""
        labels = [(view.appears(thing), view.vanishes(thing), view.changes(thing)) for thing, view, _ in things]
        times = [[_NEVER if label is None else _tenths(label) for label in row] for row in labels]
        looks = [
            (
                _COLOURS.index(thing.colour),
                _SHAPES.index(thing.shape),
                _COLOURS.index(thing.later_colour) if thing.later_colour and view.changes(thing) else 0,
                min(number, _NUM_MEDIA - 1),
            )
            for thing, view, number in things
        ]
        ways = [_way(thing, view) for thing, view, _ in things]
        return Stories(
            np.array(times, int).reshape(-1, 3), np.array(looks, int).reshape(-1, 4), np.array(ways).reshape(-1, 7)
        )

    @staticmethod
    def join(parts: list[Stories]) -> Stories:
        """Of several prompts, one after the other."""
        return Stories(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass
class Clocks:
    """What questions need to know of times and videos, one row for each; -100 and NaN where they do not.

    ``nearest`` (num_questions,) is which of the prompt's times is meant, in tenths of a second; ``others``
    (num_questions, 5) are the digit that is shown then (0 for none), the last times of two videos, and for each of the two
    whether what is asked for is in it; ``spots`` (num_questions, 2) is where the thing that is asked about is then.
    """

    nearest: np.ndarray
    others: np.ndarray
    spots: np.ndarray

    @staticmethod
    def of(questions: list[Question], views: list[View]) -> Clocks:
        """Of questions about videos."""
        clocks = Clocks(
            *(np.full(len(questions), _NOT_ASKED), np.full((len(questions), 5), _NOT_ASKED)),
            np.full((len(questions), 2), np.nan),
        )
        for number, question in enumerate(questions):
            if question.kind == "compare":
                clocks.others[number, 1:3] = [_tenths(view.labels[-1]) for view in views]
            if question.found is not None:
                clocks.others[number, 3:] = question.found
            if question.moment is None:
                continue
            (view,) = views
            group = view.groups[view.labels.index(question.moment)]
            shown = [digit for digit in view.digits if any(digit.is_shown(seconds) for seconds in group)]
            clocks.nearest[number] = _tenths(question.moment)
            clocks.others[number, 0] = _SHAPES.index(shown[0].shape) if shown else 0
            times = [seconds for seconds in group if question.thing and question.thing.is_shown(seconds)]
            if question.thing is not None and times:
                x, y, _ = question.thing.place(times[0])
                clocks.spots[number] = (2 * x / view.scene.width - 1, 2 * y / view.scene.height - 1)
        return clocks

    @staticmethod
    def join(parts: list[Clocks]) -> Clocks:
        """Of several prompts, one after the other."""
        return Clocks(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def _way(thing: Thing, view: View) -> tuple[float, ...]:
    times = view.shown_times(thing)
    (x, y, size), (last_x, last_y, last_size) = thing.place(times[0]), thing.place(times[-1])
    across, down = 2 / view.scene.width, 2 / view.scene.height
    start, end = (x * across - 1, y * down - 1), (last_x * across - 1, last_y * down - 1)
    return (*start, *end, end[0] - start[0], end[1] - start[1], float(np.log(last_size / size)))


def cells_of(view: View, height: int, width: int, cell_pixels: int, *, number: int | None = None) -> Cells:
    """Facts of a video or picture that is shown at ``height`` x ``width`` pixels; ``number`` counts videos, from 0."""
    rows, columns = height // cell_pixels, width // cell_pixels
    shape = (len(view.groups), rows, columns)
    cells = Cells(
        *(np.zeros(shape, int), np.zeros(shape, int), np.zeros((*shape, 2), bool)),
        *(np.zeros((*shape, 4)), np.zeros((*shape, 4)), np.zeros((*shape, 2))),
        History.blank(shape),
    )
    middles_y, middles_x = (np.mgrid[0:rows, 0:columns] + 0.5) * cell_pixels
    for place, group in enumerate(view.groups):
        nearest = np.full((rows, columns), np.inf)
        if number is not None:
            cells.history.tenths[place] = _tenths(view.labels[place])
            cells.history.media[place] = min(number, _NUM_MEDIA - 1)
        for thing in view.scene.things:
            times = [seconds for seconds in group if thing.is_shown(seconds)]
            if not times:
                continue
            boxes = [_box(view.scene, thing, seconds, height, width) for seconds in group]
            covered = np.zeros((rows, columns), bool)
            for (x, y, half_x, half_y), seconds in zip(boxes, group, strict=True):
                if thing.is_shown(seconds):
                    covered |= (abs(middles_x - x) < half_x) & (abs(middles_y - y) < half_y)
            x, y = boxes[0][:2]
            distance = np.hypot(middles_x - x, middles_y - y)
            here = covered & (distance < nearest)
            nearest[here] = distance[here]
            cells.colours[place][here] = _COLOURS.index(thing.colour_at(times[-1]))
            cells.shapes[place][here] = _SHAPES.index(thing.shape)
            cells.shown[place][here] = [thing.is_shown(seconds) for seconds in group]
            places = [part for x, y, *_ in boxes for part in ((x - middles_x), (y - middles_y))]
            cells.places[place][here] = np.stack(places, -1)[here] / cell_pixels
            cells.spots[place][here] = [part for x, y, *_ in boxes for part in (2 * x / width - 1, 2 * y / height - 1)]
            halves = [half_x - _MARGIN_PIXELS for _, _, half_x, _ in boxes]
            cells.extents[place][here] = np.array(halves) / cell_pixels
            if number is not None:
                cells.history.note(place, here, thing, view)
    flat = int(np.prod(shape))
    return Cells(
        cells.colours.reshape(flat),
        cells.shapes.reshape(flat),
        cells.shown.reshape(flat, 2),
        cells.places.reshape(flat, 4),
        cells.spots.reshape(flat, 4),
        cells.extents.reshape(flat, 2),
        cells.history.flat(),
    )


def _box(scene: Scene, thing: Thing, seconds: float, height: int, width: int) -> tuple[float, float, float, float]:
    """Centre and half sides of a thing in the pixels that are shown, with a margin."""
    x, y, size = thing.place(seconds)
    across, down = width / scene.width, height / scene.height
    return x * across, y * down, size * across / 2 + _MARGIN_PIXELS, size * down / 2 + _MARGIN_PIXELS


class Teacher(nn.Module):
    """Reads the facts from tokens' features with one linear layer."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.read = nn.Linear(num_features, NUM_FACTS)

    def forward(self, features: torch.Tensor, cells: Cells) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and how much is read right in cells that are not empty; ``features`` are (num_tokens, num_features)."""
        colours, shapes, shown, places, spots, extents = self.read(self.norm(features.float())).split(_SIZES, -1)
        there = features.device
        colour, shape = (torch.from_numpy(values).to(there) for values in (cells.colours, cells.shapes))
        weights = torch.from_numpy(np.where(cells.colours > 0, 1.0, _EMPTY_WEIGHT)).float().to(there)
        total = weights.sum()
        loss = (weights * F.cross_entropy(colours, colour, reduction="none")).sum() / total
        loss = loss + (weights * F.cross_entropy(shapes, shape, reduction="none")).sum() / total
        is_shown = torch.from_numpy(cells.shown).float().to(there)
        presence = F.binary_cross_entropy_with_logits(shown, is_shown, reduction="none").sum(-1)
        loss = loss + (weights * presence).sum() / total
        full = np.flatnonzero(cells.colours > 0)
        both = np.flatnonzero((cells.colours > 0) & (cells.shown.sum(-1) == _NUM_FRAMES))
        wanted, wanted_spots, wanted_extents = (
            torch.from_numpy(values[both]).float().to(there) for values in (cells.places, cells.spots, cells.extents)
        )
        chosen = torch.from_numpy(both).to(there)
        places, spots, extents = places[chosen], spots[chosen], extents[chosen]
        distance = F.smooth_l1_loss(places, wanted, beta=0.1, reduction="none").sum(-1)
        # What moves between the two frames is small beside where it is; it counts by itself.
        moved, wanted_moved = (x[:, 2:] - x[:, :2] for x in (places, wanted))
        motion = F.smooth_l1_loss(moved, wanted_moved, beta=0.02, reduction="none").sum(-1)
        # Attention knows distances between tokens only; where in the picture something is, features have to say.
        off = F.smooth_l1_loss(spots, wanted_spots, beta=0.1, reduction="none").sum(-1)
        size = F.smooth_l1_loss(extents, wanted_extents, beta=0.05, reduction="none").sum(-1)
        # So does growth.
        grown, wanted_grown = (x[:, 1] - x[:, 0] for x in (extents, wanted_extents))
        growth = F.smooth_l1_loss(grown, wanted_grown, beta=0.02, reduction="none")
        far = distance.sum() + 3 * motion.sum() + off.sum() + size.sum() + 3 * growth.sum()
        loss = loss + far / max(len(both), 1)
        seen: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if len(full):
                cells_full = torch.from_numpy(full).to(there)
                seen["sees_colour"] = (colours.argmax(-1) == colour)[cells_full].float().mean()
                seen["sees_shape"] = (shapes.argmax(-1) == shape)[cells_full].float().mean()
            if len(both):
                seen["sees_place"] = (places - wanted).abs().mean()
                seen["sees_spot"] = (spots - wanted_spots).abs().mean()
                seen["sees_size"] = (extents - wanted_extents).abs().mean()
                seen["sees_motion"] = (moved - wanted_moved).abs().mean()
        return loss, seen


class HistoryTeacher(nn.Module):
    """Reads history from the text model's visual tokens: what one glance back tells, and what needs another."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(num_features) for name in _HISTORY_SIZES})
        self.reads = nn.ModuleDict(
            {name: nn.Linear(num_features, sum(sizes)) for name, sizes in _HISTORY_SIZES.items()}
        )

    def forward(
        self, early: torch.Tensor, late: torch.Tensor, history: History
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and how much is read right; ``early`` and ``late`` are (num_tokens, num_features), of two layers."""
        tenths, media, is_first = self._read("early", early)
        first_tenths, ranks, first_colours, starts, moved = self._read("late", late)
        there = late.device
        wanted = {name: torch.from_numpy(values).to(there) for name, values in vars(history).items()}
        loss = _class_loss(tenths, wanted["tenths"]) + 0.3 * _class_loss(media, wanted["media"])
        for logits, name in ((first_tenths, "first_tenths"), (ranks, "ranks"), (first_colours, "first_colours")):
            loss = loss + _class_loss(logits, wanted[name])
        seen: dict[str, torch.Tensor] = {}
        known = torch.from_numpy(np.flatnonzero(history.is_first >= 0)).to(there)
        if len(known):
            far = moved[known] - wanted["moved"][known].float()
            firsts = F.binary_cross_entropy_with_logits(is_first[known, 0], wanted["is_first"][known].float())
            begun = F.smooth_l1_loss(starts[known], wanted["starts"][known].float(), beta=0.1)
            loss = loss + firsts + 2 * begun + 6 * F.smooth_l1_loss(far, torch.zeros_like(far), beta=0.03)
            seen["knows_way"] = far.detach().abs().mean()
        for name, logits, classes in (
            ("knows_start", first_tenths, "first_tenths"),
            ("knows_rank", ranks, "ranks"),
            ("knows_time", tenths, "tenths"),
        ):
            if (getattr(history, classes) >= 0).any():
                seen[name] = _right_share(logits, wanted[classes])
        return loss, seen

    def _read(self, name: str, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.reads[name](self.norms[name](features.float())).split(_HISTORY_SIZES[name], -1)


class StoryTeacher(nn.Module):
    """Reads all that a clip tells of a thing from the last token of a question about it.

    A one-word answer tells a model little of how to find the thing that a question means; its whole story tells more.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.read = nn.Linear(num_features, sum(_STORY_SIZES))

    def forward(self, features: torch.Tensor, stories: Stories) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and how much is read right; ``features`` are (num_things, num_features)."""
        parts = self.read(self.norm(features.float())).split(_STORY_SIZES, -1)
        times, looks, ways = (
            torch.from_numpy(values).to(features.device) for values in (stories.times, stories.looks, stories.ways)
        )
        loss = parts[-1].sum() * 0.0
        for logits, wanted in zip(parts[:-1], (*times.unbind(-1), *looks.unbind(-1)), strict=True):
            loss = loss + _class_loss(logits, wanted)
        if not len(looks):
            return loss, {}
        off = F.smooth_l1_loss(parts[-1], ways.float(), beta=0.05)
        seen = {"finds_way": (parts[-1] - ways).detach().abs().mean()}
        for name, logits, wanted in (
            ("finds_colour", parts[3], looks[:, 0]),
            ("finds_shape", parts[4], looks[:, 1]),
            ("finds_start", parts[0], times[:, 0]),
        ):
            seen[name] = _right_share(logits, wanted)
        return loss + 8 * off, seen


class ClockTeacher(nn.Module):
    """Reads from the last tokens of questions what they need to know of times and videos: which is meant, what is there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(num_features) for name in _CLOCK_SIZES})
        self.reads = nn.ModuleDict({name: nn.Linear(num_features, sum(sizes)) for name, sizes in _CLOCK_SIZES.items()})

    def forward(
        self, early: torch.Tensor, late: torch.Tensor, clocks: Clocks
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and how much is read right; ``early`` and ``late`` are (num_questions, num_features), of two layers."""
        (meant,) = self._read("early", early)
        *classes, spots = self._read("late", late)
        there = late.device
        nearest, others = (torch.from_numpy(values).to(there) for values in (clocks.nearest, clocks.others))
        loss = _class_loss(meant, nearest) + spots.sum() * 0.0
        for logits, wanted in zip(classes, others.unbind(-1), strict=True):
            loss = loss + _class_loss(logits, wanted)
        known = np.flatnonzero(~np.isnan(clocks.spots).any(-1))
        if len(known):
            wanted_spots = torch.from_numpy(clocks.spots[known]).float().to(there)
            loss = loss + 8 * F.smooth_l1_loss(spots[torch.from_numpy(known).to(there)], wanted_spots, beta=0.05)
        seen: dict[str, torch.Tensor] = {}
        if (clocks.nearest >= 0).any():
            seen["knows_moment"] = _right_share(meant, nearest)
        for name, column in (("knows_digit", 0), ("knows_end", 2), ("knows_first", 3), ("knows_second", 4)):
            if (clocks.others[:, column] >= 0).any():
                seen[name] = _right_share(classes[column], others[:, column])
        return loss, seen

    def _read(self, name: str, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.reads[name](self.norms[name](features.float())).split(_CLOCK_SIZES[name], -1)


def _class_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the rows where something is asked, 0 if there are none."""
    losses = F.cross_entropy(logits.float(), wanted, ignore_index=_NOT_ASKED, reduction="sum")
    return losses / (wanted != _NOT_ASKED).sum().clamp(min=1)


@torch.no_grad()
def _right_share(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Share of the rows where something is asked that are right."""
    return (logits.argmax(-1) == wanted).sum() / (wanted != _NOT_ASKED).sum()


class FactEmbedding(nn.Linear):
    """What a text model reads in place of features: (num_tokens, NUM_FACTS) -> (num_tokens, num_features)."""

    def __init__(self, num_features: int) -> None:
        super().__init__(NUM_FACTS, num_features)
        nn.init.normal_(self.weight, std=_EMBEDDING_STD)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def embed(self, cells: Cells) -> torch.Tensor:
        """What a tower's features should be, (num_tokens, num_features)."""
        return self(torch.from_numpy(cells.table()).to(self.weight.device))


def distance(features: torch.Tensor, wanted: torch.Tensor, cells: Cells) -> torch.Tensor:
    """Mean squared distance in shares of the variance of ``wanted``; empty cells count less."""
    weights = torch.from_numpy(np.where(cells.colours > 0, 1.0, _EMPTY_WEIGHT)).float().to(features.device)
    squares = (features.float() - wanted).square().mean(-1)
    return (weights * squares).sum() / (weights.sum() * wanted.var())
