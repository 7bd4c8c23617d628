"""The model and clips that come with the package: answers through a served file are right, and come from watching."""

import pytest

from filmstrip import load_video
from filmstrip.demo import bundled
from filmstrip.demo.evaluate import FIRST_SEED, evaluate, evaluate_ablations
from filmstrip.demo.scenes import Painter
from filmstrip.demo.serving import running_server

NUM_CLIPS = 40
NUM_ABLATED_CLIPS = 10
FLOOR = 0.96
FLOOR_OF_TWO_VIDEOS = 0.9
CHANCE = 0.35
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def server(folder):
    with running_server(str(bundled.MODEL), folder) as running:
        yield running


def test_it_is_small_enough_for_the_package():
    weights = sum(file.stat().st_size for file in bundled.MODEL.glob("*.safetensors"))
    assert 4 * MEBIBYTE < weights <= 15 * MEBIBYTE
    assert sum(file.stat().st_size for file in bundled.CLIPS.iterdir()) < MEBIBYTE


def _thing(clip, colour, shape):
    (found,) = [thing for thing in bundled.scene_of(clip).things if (thing.colour, thing.shape) == (colour, shape)]
    return found


def test_the_truths_told_with_the_questions_are_those_of_the_clips():
    when, direction, compare = bundled.QUESTIONS
    assert (when.clips, when.text) == (("first.mp4",), "When does the red square appear?")
    assert when.truth == f"at {_thing('first.mp4', 'red', 'square').appears_seconds:.1f} seconds"
    assert (direction.clips, direction.text) == (("second.mp4",), "Which way does the red circle move?")
    assert direction.truth == _thing("second.mp4", "red", "circle").motion
    assert (compare.clips, compare.text) == (("first.mp4", "second.mp4"), "Which video shows a green star?")
    stars = [{(t.colour, t.shape) for t in bundled.scene_of(clip).things} for clip in compare.clips]
    assert [("green", "star") in things for things in stars] == [False, True]
    assert compare.truth == "the second one"


@pytest.mark.parametrize("clip", bundled.SEEDS)
def test_the_clips_show_their_scenes(clip):
    scene = bundled.scene_of(clip)
    frames, info = load_video(str(bundled.CLIPS / clip), num_frames=-1)
    assert frames.shape == (scene.num_frames, scene.height, scene.width, 3)
    assert info["timestamps"][-1] == pytest.approx((scene.num_frames - 1) / scene.frames_per_second)
    painter = Painter(scene)
    painted = painter.frame(0)
    assert abs(frames[0].astype(int) - painted).mean() < 8  # compressed, but the same picture


def test_it_answers_questions_about_clips_it_never_saw(server, folder):
    table = evaluate(server.url, folder, num_clips=NUM_CLIPS, first_seed=FIRST_SEED + 100_000)
    assert sum(table.asked.values()) > 5 * NUM_CLIPS
    assert table.share() >= FLOOR, table.wrong
    assert table.asked["compare"] > 30
    assert table.share("compare") >= FLOOR_OF_TWO_VIDEOS, table.wrong


def test_without_order_or_times_it_cannot_tell(server, folder):
    tables = evaluate_ablations(server.url, folder, num_clips=NUM_ABLATED_CLIPS, first_seed=FIRST_SEED + 200_000)
    whole = tables["none"]
    assert min(whole.asked["direction"], whole.asked["when"]) > 5
    assert whole.share("direction", "when") >= FLOOR, whole.wrong
    for taken in ("other clip", "frames shuffled", "frames reversed", "frames repeated"):
        assert tables[taken].share("direction", "when") <= CHANCE, taken
    assert tables["times squeezed"].share("when") <= CHANCE
    assert tables["times squeezed"].share("direction") >= FLOOR
