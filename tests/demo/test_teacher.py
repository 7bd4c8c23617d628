"""The teacher's facts are where the painted things are, and its loss falls when features hold them."""

import numpy as np
import torch

from filmstrip.demo.questions import View
from filmstrip.demo.scenes import COLOURS, SHAPES, Painter, make_scene
from filmstrip.demo.teacher import Cells, Teacher, cells_of

_COLOURS = ("none", *COLOURS)
_SHAPES = ("none", *SHAPES, *"0123456789")


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - rgb).sum()))


def test_cells_hold_what_is_painted_there() -> None:
    checked = 0
    for seed in range(40, 60):
        scene = make_scene(seed)
        view = View(scene, [i / scene.frames_per_second for i in range(scene.num_frames)])
        height, width = 96, 128
        cells = cells_of(view, height, width, 32)
        assert len(cells.colours) == len(view.groups) * 12
        for thing in scene.shapes:
            group = view.seen_groups(thing)[-1] // 2
            seconds = view.groups[group][1]
            if not all(thing.is_shown(t) for t in view.groups[group]):
                continue
            x, y, _ = thing.place(seconds)
            column, row = int(x * width / scene.width // 32), int(y * height / scene.height // 32)
            token = group * 12 + row * 4 + column
            assert _SHAPES[cells.shapes[token]] == thing.shape
            assert _COLOURS[cells.colours[token]] == thing.colour_at(seconds)
            pixel = Painter(scene).frame(round(seconds * scene.frames_per_second))[int(y), int(x)]
            assert _nearest_colour(pixel) == thing.colour_at(seconds)
            assert cells.shown[token].all()
            found_x = (cells.places[token, 2] + column + 0.5) * 32 * scene.width / width
            found_y = (cells.places[token, 3] + row + 0.5) * 32 * scene.height / height
            assert np.allclose((found_x, found_y), (x, y))
            spot_x, spot_y = (cells.spots[token, 2:] + 1) / 2
            assert np.allclose((spot_x * scene.width, spot_y * scene.height), (x, y))
            checked += 1
    assert checked > 8


def test_cells_without_a_thing_are_empty() -> None:
    scene = make_scene(0)  # its only thing appears after seven seconds
    cells = cells_of(View(scene, [0.0, 0.25, 0.5, 0.75]), 160, 96, 32)
    assert not cells.colours.any()
    assert not cells.shown.any()


def test_the_loss_falls_when_features_hold_the_facts() -> None:
    torch.manual_seed(0)
    scene = make_scene(1)
    cells = cells_of(View(scene, [i / scene.frames_per_second for i in range(scene.num_frames)]), 96, 128, 32)
    facts = np.concatenate(
        [np.eye(9)[cells.colours], np.eye(16)[cells.shapes], cells.shown, cells.places, cells.spots], axis=1
    ).astype(np.float32)
    teacher = Teacher(facts.shape[1])
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        loss, seen = teacher(torch.from_numpy(facts), cells)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert seen["sees_colour"] > 0.95
    assert seen["sees_shape"] > 0.95
    shuffled = Cells.join([cells])
    shuffled.colours = np.random.default_rng(0).permutation(cells.colours)
    assert teacher(torch.from_numpy(facts), shuffled)[1]["sees_colour"] < 0.7
