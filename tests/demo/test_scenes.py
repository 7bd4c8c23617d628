"""Scenes and clips: the same seed gives the same scene, facts hold on the painted frames, files decode to them."""

import random

import numpy as np
import pytest

from filmstrip.demo.clips import encode_picture, encode_scene
from filmstrip.demo.scenes import COLOURS, Painter, make_picture_scene, make_scene, picture_of
from filmstrip.media.image import open_image
from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames


def _decoded(clip: bytes) -> tuple[np.ndarray, list[float]]:
    reader = open_video(BytesSource(clip))
    frames, _ = read_frames(reader, range(reader.metadata.total_num_frames), 1)
    times = reader.metadata.timestamps.tolist()
    reader.close()
    return frames, times


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - rgb).sum()))


def test_a_seed_is_a_scene() -> None:
    assert make_scene(7) == make_scene(7)
    assert make_scene(7) != make_scene(8)
    first, second = (Painter(make_scene(7)).frame(0) for _ in range(2))
    assert np.array_equal(first, second)


def test_scenes_vary_and_keep_their_promises() -> None:
    scenes = [make_scene(seed) for seed in range(400)]
    motions = {thing.motion for scene in scenes for thing in scene.shapes}
    assert len(motions) == 11
    assert {len(scene.shapes) for scene in scenes} == {0, 1, 2, 3}
    assert any(scene.digits for scene in scenes)
    assert any(thing.later_colour for scene in scenes for thing in scene.things)
    for scene in scenes:
        assert 1.9 <= scene.duration_seconds <= 20.1
        colours = [thing.colour for thing in scene.shapes] + [t.later_colour for t in scene.shapes if t.later_colour]
        assert len(set(colours)) == len(colours)
        for thing in scene.things:
            for seconds in (thing.appears_seconds, thing.vanishes_seconds):
                x, y, size = thing.place(seconds)
                assert size / 2 <= x <= scene.width - size / 2
                assert size / 2 <= y <= scene.height - size / 2


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_decoded_clips_show_the_facts(codec: str) -> None:
    checked = 0
    for seed in range(30, 36):
        scene = make_scene(seed)
        frames, times = _decoded(encode_scene(scene, codec=codec))
        assert len(frames) == scene.num_frames
        assert times == pytest.approx([i / scene.frames_per_second for i in range(scene.num_frames)], abs=2e-3)
        for thing in scene.shapes:
            for frame, seconds in list(zip(frames, times, strict=True))[:: max(scene.num_frames // 4, 1)]:
                if thing.is_shown(seconds - 1e-2) and thing.is_shown(seconds + 1e-2):
                    x, y, _ = thing.place(seconds)
                    assert _nearest_colour(frame[int(y), int(x)]) == thing.colour_at(seconds)
                    checked += 1
    assert checked >= 12


def test_frames_in_another_order() -> None:
    scene = make_scene(31)
    order = random.Random(0).sample(range(scene.num_frames), scene.num_frames)
    frames, _ = _decoded(encode_scene(scene, frame_order=order))
    painter = Painter(scene)
    painted = [painter.frame(index) for index in range(scene.num_frames)]
    for place in (0, scene.num_frames // 2, scene.num_frames - 1):
        difference = np.abs(frames[place].astype(int) - painted[order[place]].astype(int)).mean()
        assert difference < 8


def test_pictures() -> None:
    picture = make_picture_scene(3)
    image = np.array(open_image(BytesSource(encode_picture(picture)), 1 << 24))
    thing = picture.things[0]
    x, y, _ = thing.place(0)
    assert _nearest_colour(image[int(y), int(x)]) == thing.colour
    again = picture_of(thing, 5).things[0]
    assert (again.shape, again.colour) == (thing.shape, thing.colour)
    assert again.start != thing.start


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="h264 or vp9"):
        encode_scene(make_scene(0), codec="mpeg1")
