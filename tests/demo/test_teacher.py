"""The teacher's facts are where the painted things are, and its loss falls when features hold them."""

import random

import numpy as np
import torch

from filmstrip.demo.questions import View, ask, ask_of_two, grid_name
from filmstrip.demo.scenes import COLOURS, SHAPES, Painter, Scene, make_scene
from filmstrip.demo.teacher import Cells, Clocks, ClockTeacher, HistoryTeacher, Stories, StoryTeacher, Teacher, cells_of

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
            assert np.allclose(cells.extents[token, 1] * 64 * scene.width / width, thing.place(seconds)[2])
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
    facts = cells.table()
    teacher = Teacher(facts.shape[1])
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.03)
    losses, seen = [], {}
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


def _history_scene() -> tuple[Scene, View]:
    """A scene of which two things come after the first group."""
    for seed in range(1000):
        scene = make_scene(seed)
        view = View(scene, [i / 4 for i in range(4 * scene.num_frames // scene.frames_per_second)])
        if sum(view.seen_groups(thing)[0] > 0 for thing in view.shapes) == 2 and len(view.shapes) == 2:
            return scene, view
    raise AssertionError


def test_history_tells_what_came_before() -> None:
    scene, view = _history_scene()
    cells = cells_of(view, 96, 128, 32, number=1)
    history = cells.history
    assert history.tenths.tolist() == [round(float(label) * 10) for label in view.labels for _ in range(12)]
    assert set(history.media.tolist()) == {1}
    assert (history.is_first[cells.colours == 0] < 0).all()
    for rank, thing in enumerate(view.shapes):
        mine = (cells.shapes == _SHAPES.index(thing.shape)) & (cells.shown.any(1))
        groups = np.flatnonzero(mine) // 12
        first, last = view.seen_groups(thing)[0], view.seen_groups(thing)[-1]
        assert first > 0
        assert history.is_first[mine].tolist() == [int(group == first) for group in groups]
        assert set(history.first_tenths[mine].tolist()) == {round(float(view.labels[first]) * 10)}
        assert set(history.ranks[mine].tolist()) == {rank}
        assert {_COLOURS[colour] for colour in history.first_colours[mine]} == {thing.colour}
        began = next(t for t in view.groups[first] if thing.is_shown(t))
        ended = [t for t in view.groups[last] if thing.is_shown(t)][-1]
        x, y, size = thing.place(began)
        end_x, end_y, end_size = thing.place(ended)
        token = np.flatnonzero(mine)[-1]
        start = (history.starts[token] + 1) / 2 * (scene.width, scene.height)
        assert np.allclose(start, (x, y))
        assert np.allclose(
            (history.starts[token] + history.moved[token, :2] + 1) / 2 * (scene.width, scene.height), (end_x, end_y)
        )
        assert np.isclose(size * np.exp(history.moved[token, 2]), end_size)


def test_pictures_have_no_history() -> None:
    scene = make_scene(1)
    history = cells_of(View(scene, [0.0]), 96, 128, 32).history
    for name in ("tenths", "media", "is_first", "first_tenths", "ranks", "first_colours"):
        assert (getattr(history, name) < 0).all()
    loss, known = HistoryTeacher(8)(torch.ones(12, 8), torch.ones(12, 8), history)
    assert loss.item() == 0
    assert known == {}


def test_history_can_be_read_from_features_that_hold_it() -> None:
    torch.manual_seed(0)
    _, view = _history_scene()
    history = cells_of(view, 96, 128, 32, number=0).history
    columns = [np.eye(250)[np.maximum(values, 0)] for values in (history.tenths, history.first_tenths)]
    others = np.stack([history.is_first, history.ranks, history.first_colours], 1) / 10
    features = np.concatenate(
        [*columns, np.eye(9)[np.maximum(history.first_colours, 0)], others, history.starts, history.moved], 1
    )
    features = torch.from_numpy(features.astype(np.float32))
    teacher = HistoryTeacher(features.shape[1])
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    losses, known = [], {}
    for _ in range(100):
        loss, known = teacher(features, features, history)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert known["knows_time"] > 0.95
    assert known["knows_start"] > 0.95
    blind, _ = teacher(torch.zeros_like(features), torch.zeros_like(features), history)
    assert blind > 3 * losses[-1]


def test_stories_are_of_the_whole_clip_and_can_be_read_from_features_that_hold_them() -> None:
    torch.manual_seed(0)
    _, view = _history_scene()
    things = [(thing, view, 1) for thing in view.shapes]
    stories = Stories.of(things)
    for (thing, *_), times, looks, way in zip(things, stories.times, stories.looks, stories.ways, strict=True):
        wanted = [view.appears(thing), view.vanishes(thing), view.changes(thing)]
        assert times.tolist() == [250 if label is None else round(float(label) * 10) for label in wanted]
        assert [_COLOURS[looks[0]], _SHAPES[looks[1]]] == [thing.colour, thing.shape]
        assert looks[3] == 1
        assert (looks[2] > 0) == (view.changes(thing) is not None)
        shown = view.shown_times(thing)
        (x, y, size), (end_x, end_y, end_size) = thing.place(shown[0]), thing.place(shown[-1])
        assert np.allclose((way[:2] + 1) / 2 * (view.scene.width, view.scene.height), (x, y))
        assert np.allclose((way[2:4] + 1) / 2 * (view.scene.width, view.scene.height), (end_x, end_y))
        assert np.allclose(way[4:], [*(way[2:4] - way[:2]), np.log(end_size / size)])
    teacher = StoryTeacher(16)
    features = torch.randn(len(things), 16)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.03)
    losses, found = [], {}
    for _ in range(60):
        loss, found = teacher(features, stories)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert found["finds_colour"] == found["finds_shape"] == found["finds_start"] == 1
    assert teacher(features.flip(0), stories)[0] > 5 * losses[-1]
    nothing, found = teacher(torch.zeros(0, 16), Stories.of([]))
    assert nothing == 0
    assert found == {}


def test_clocks_tell_what_is_seen_at_the_nearest_time() -> None:
    torch.manual_seed(0)
    checked = 0
    for seed in range(60):
        scene = make_scene(seed)
        view = View(scene, [i / 4 for i in range(4 * scene.num_frames // scene.frames_per_second)])
        asked = [
            q
            for n in range(8)
            for kind in ("digit_at", "where_at", "colour")
            if (q := ask(kind, view, random.Random(n)))
        ]
        clocks = Clocks.of(asked, [view])
        for question, nearest, (digit, *ends), spot in zip(
            asked, clocks.nearest, clocks.others, clocks.spots, strict=True
        ):
            assert ends == [-100] * 4
            if question.kind == "colour":
                assert (nearest, digit) == (-100, -100)
                assert np.isnan(spot).all()
                continue
            said = next(float(word) for word in question.text.replace(",", "").rstrip("?").split() if word[0].isdigit())
            middles = [(group[0] + group[-1]) / 2 for group in view.groups]
            assert abs(nearest / 10 - said) <= min(abs(middle - said) for middle in middles) + 0.11
            if question.kind == "digit_at":
                assert ("None", *_SHAPES[1:])[digit] == question.answer
            else:
                x, y = (spot + 1) / 2 * (scene.width, scene.height)
                assert grid_name(scene, x, y) in (question.answer.lower(), None)
            checked += 1
    assert checked > 100
    views = [View(make_scene(seed), [0.0, 0.5, 1.0, 1.5]) for seed in (1, 2)]
    compared = next(q for n in range(50) if (q := ask_of_two((views[0], views[1]), random.Random(n))))
    assert Clocks.of([compared], views).others[0, :3].tolist() == [-100, 12, 12]


def test_questions_about_two_videos_are_told_which_has_what_is_asked_for() -> None:
    answers = {
        "The first video": [1, 0],
        "The second video": [0, 1],
        "Both videos": [1, 1],
        "Neither video": [0, 0],
    }
    asked = set()
    for seed in range(0, 120, 2):
        views = [View(scene, [i / 2 for i in range(4)]) for scene in (make_scene(seed), make_scene(seed + 1))]
        for number in range(6):
            question = ask_of_two((views[0], views[1]), random.Random(number))
            if question is None:
                continue
            found = Clocks.of([question], views).others[0, 3:].tolist()
            says_which = question.answer in answers and "er?" not in question.text  # longer, shorter
            assert found == (answers[question.answer] if says_which else [-100, -100])
            asked.add(question.answer)
    assert asked >= answers.keys()


def test_clocks_can_be_read_from_features_that_hold_them() -> None:
    torch.manual_seed(0)
    clocks = Clocks(
        np.array([2, 249, -100]),
        np.array([[3, -100, -100, 1, 0], [0, -100, -100, 0, 0], [-100, 31, 45, -100, -100]]),
        np.array([[0.5, -0.5], [np.nan, np.nan], [np.nan, np.nan]]),
    )
    teacher, features = ClockTeacher(8), torch.randn(3, 8)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.03)
    losses, found = [], {}
    for _ in range(80):
        loss, found = teacher(features, features, clocks)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert found == dict.fromkeys(("knows_moment", "knows_digit", "knows_end", "knows_first", "knows_second"), 1.0)
    assert teacher(features.roll(1, 0), features.roll(1, 0), clocks)[0] > 5 * losses[-1]
    nothing, found = teacher(features[:0], features[:0], Clocks.of([], []))
    assert nothing == 0
    assert found == {}
