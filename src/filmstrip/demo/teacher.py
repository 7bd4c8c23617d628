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

from filmstrip.demo.questions import View
from filmstrip.demo.scenes import COLOURS, DIGITS, SHAPES, Scene, Thing

_COLOURS = ("none", *COLOURS)
_SHAPES = ("none", *SHAPES, *DIGITS)
_MARGIN_PIXELS = 8
_EMPTY_WEIGHT = 0.2
_NUM_FRAMES = 2
_SIZES = (len(_COLOURS), len(_SHAPES), _NUM_FRAMES, 2 * _NUM_FRAMES, 2 * _NUM_FRAMES)
NUM_FACTS = sum(_SIZES)
"""Of a cell, one-hot classes counted one by one."""
_EMBEDDING_STD = 0.05


@dataclass
class Cells:
    """Facts of every merged token, in the tokens' order.

    ``colours`` and ``shapes`` are class numbers (num_tokens,), 0 for an empty cell; ``shown`` (num_tokens, 2) says in
    which frames of the group; ``places`` (num_tokens, 4) are x and y of the centre in both frames, from the cell's middle,
    in cells; ``spots`` (num_tokens, 4) the same from the picture's middle, -1 to 1 from edge to edge.
    """

    colours: np.ndarray
    shapes: np.ndarray
    shown: np.ndarray
    places: np.ndarray
    spots: np.ndarray

    def table(self) -> np.ndarray:
        """All facts as numbers, classes one-hot: (num_tokens, NUM_FACTS), float32."""
        columns = (
            *(np.eye(len(_COLOURS))[self.colours], np.eye(len(_SHAPES))[self.shapes]),
            *(self.shown, self.places, self.spots),
        )
        return np.concatenate(columns, axis=1).astype(np.float32)

    @staticmethod
    def join(parts: list[Cells]) -> Cells:
        """Facts of several items, one after the other."""
        names = ("colours", "shapes", "shown", "places", "spots")
        return Cells(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def cells_of(view: View, height: int, width: int, cell_pixels: int) -> Cells:
    """Facts of a video or picture that is shown at ``height`` x ``width`` pixels."""
    rows, columns = height // cell_pixels, width // cell_pixels
    shape = (len(view.groups), rows, columns)
    cells = Cells(
        *(np.zeros(shape, int), np.zeros(shape, int), np.zeros((*shape, 2), bool)),
        *(np.zeros((*shape, 4)), np.zeros((*shape, 4))),
    )
    middles_y, middles_x = (np.mgrid[0:rows, 0:columns] + 0.5) * cell_pixels
    for number, group in enumerate(view.groups):
        nearest = np.full((rows, columns), np.inf)
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
            cells.colours[number][here] = _COLOURS.index(thing.colour_at(times[-1]))
            cells.shapes[number][here] = _SHAPES.index(thing.shape)
            cells.shown[number][here] = [thing.is_shown(seconds) for seconds in group]
            places = [part for x, y, *_ in boxes for part in ((x - middles_x), (y - middles_y))]
            cells.places[number][here] = np.stack(places, -1)[here] / cell_pixels
            cells.spots[number][here] = [part for x, y, *_ in boxes for part in (2 * x / width - 1, 2 * y / height - 1)]
    flat = int(np.prod(shape))
    return Cells(
        cells.colours.reshape(flat),
        cells.shapes.reshape(flat),
        cells.shown.reshape(flat, 2),
        cells.places.reshape(flat, 4),
        cells.spots.reshape(flat, 4),
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

    def forward(self, features: torch.Tensor, cells: Cells) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss, and how much is read right in cells that are not empty; ``features`` are (num_tokens, num_features)."""
        colours, shapes, shown, places, spots = self.read(self.norm(features.float())).split(_SIZES, -1)
        colour, shape = torch.from_numpy(cells.colours), torch.from_numpy(cells.shapes)
        is_full = colour > 0
        weights = torch.where(is_full, 1.0, _EMPTY_WEIGHT)
        total = weights.sum()
        loss = (weights * F.cross_entropy(colours, colour, reduction="none")).sum() / total
        loss = loss + (weights * F.cross_entropy(shapes, shape, reduction="none")).sum() / total
        is_shown = torch.from_numpy(cells.shown).float()
        presence = F.binary_cross_entropy_with_logits(shown, is_shown, reduction="none").sum(-1)
        loss = loss + (weights * presence).sum() / total
        wanted = torch.from_numpy(cells.places).float()
        both = is_full & (is_shown.sum(-1) == _NUM_FRAMES)
        distance = F.smooth_l1_loss(places[both], wanted[both], beta=0.1, reduction="none").sum(-1)
        # What moves between the two frames is small beside where it is; it counts by itself.
        moved, wanted_moved = (x[both][:, 2:] - x[both][:, :2] for x in (places, wanted))
        motion = F.smooth_l1_loss(moved, wanted_moved, beta=0.02, reduction="none").sum(-1)
        count = max(int(both.sum()), 1)
        # Attention knows distances between tokens only; where in the picture something is, features have to say.
        wanted_spots = torch.from_numpy(cells.spots).float()[both]
        off = F.smooth_l1_loss(spots[both], wanted_spots, beta=0.1, reduction="none").sum(-1)
        loss = loss + (distance.sum() + 3 * motion.sum() + off.sum()) / count
        with torch.no_grad():
            full = max(int(is_full.sum()), 1)
            seen = {
                "sees_colour": float((colours.argmax(-1) == colour)[is_full].sum()) / full,
                "sees_shape": float((shapes.argmax(-1) == shape)[is_full].sum()) / full,
                "sees_place": float((places[both] - wanted[both]).abs().mean()) if int(both.sum()) else 0.0,
                "sees_spot": float((spots[both] - wanted_spots).abs().mean()) if int(both.sum()) else 0.0,
                "sees_motion": float((moved - wanted_moved).abs().mean()) if int(both.sum()) else 0.0,
            }
        return loss, seen


class FactEmbedding(nn.Linear):
    """What a text model reads in place of features: (num_tokens, NUM_FACTS) -> (num_tokens, num_features)."""

    def __init__(self, num_features: int) -> None:
        super().__init__(NUM_FACTS, num_features)
        nn.init.normal_(self.weight, std=_EMBEDDING_STD)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def embed(self, cells: Cells) -> torch.Tensor:
        """What a tower's features should be, (num_tokens, num_features)."""
        return self(torch.from_numpy(cells.table()))


def distance(features: torch.Tensor, wanted: torch.Tensor, cells: Cells) -> torch.Tensor:
    """Mean squared distance in shares of the variance of ``wanted``; empty cells count less."""
    weights = torch.from_numpy(np.where(cells.colours > 0, 1.0, _EMPTY_WEIGHT)).float()
    squares = (features.float() - wanted).square().mean(-1)
    return (weights * squares).sum() / (weights.sum() * wanted.var())
