"""Questions: their answers are those of the scene as it is seen, and the judge of answers is neither blind nor lenient."""

import random
from dataclasses import replace

import pytest

from filmstrip.demo.questions import (
    WEIGHTS,
    Question,
    View,
    ask,
    ask_in_turn,
    ask_of_picture,
    ask_of_two,
    ask_some,
    grid_name,
    is_right,
    list_looks,
    transcribe,
)
from filmstrip.demo.scenes import Background, Scene, Thing, make_picture_scene, make_scene, picture_of


def _thing(shape: str, colour: str, motion: str, **fields: object) -> Thing:
    base = Thing(shape, colour, (0, 0, 0), motion, (20.0, 50.0), (80.0, 50.0), 20.0, 20.0, 0.0, 8.0)
    return replace(base, **fields)  # type: ignore[arg-type]


@pytest.fixture
def scene() -> Scene:
    background = Background("plain", (99, 99, 99), (99, 99, 99), 0.1, 0.0, 0.0, 0)
    things = (
        _thing("circle", "red", "right", vanishes_seconds=6.2),
        _thing("star", "blue", "still", start=(50.0, 90.0), end=(50.0, 90.0), appears_seconds=3.1),
        _thing("7", "white", "still", start=(50.0, 20.0), end=(50.0, 20.0), appears_seconds=2.0, vanishes_seconds=5.0),
    )
    return Scene(0, 100, 100, 10, 80, background, things)


@pytest.fixture
def view(scene: Scene) -> View:
    return View(scene, [i * 0.25 for i in range(32)])


def _answers(view: View, kind: str) -> dict[str, Question]:
    asked = [ask(kind, view, random.Random(seed)) for seed in range(200)]
    return {question.text: question for question in asked if question is not None}


def test_facts(view: View) -> None:
    assert {q.answer for q in _answers(view, "count").values()} == {"2"}
    assert _answers(view, "direction")["Which way does the red circle move?"].answer == "Right"
    assert _answers(view, "direction")["How does the star move?"].answer == "It stays still"
    assert _answers(view, "colour")["What colour is the star?"].answer == "Blue"
    assert _answers(view, "shape")["Which shape is red?"].answer == "Circle"
    assert _answers(view, "digit")["Which digit is shown?"].answer == "7"
    assert _answers(view, "first")["Which shape appears first?"].answer == "The red circle"
    assert _answers(view, "first")["Which shape appears last?"].answer == "The blue star"
    assert _answers(view, "where_starts")["Where does the red circle start?"].answer == "Left"
    assert _answers(view, "where_ends")["Where does the circle end up?"].answer == "Right"
    (description,) = {q.answer for q in _answers(view, "describe").values()}
    assert description == "A red circle moves right. The digit 7 is shown. A blue star stays still."


def test_times_are_those_beside_the_first_frames_that_show_it(view: View) -> None:
    appears = _answers(view, "appears")["When does the blue star appear?"]
    # Frames stand at 3.0 and 3.25 seconds in the group that shows it first.
    assert (appears.answer, appears.seconds) == ("At 3.1 seconds", 3.1)
    vanishes = _answers(view, "vanishes")["When does the red circle vanish?"]
    assert (vanishes.answer, vanishes.seconds) == ("At 6.1 seconds", 6.2)
    assert _answers(view, "appears")["When does the circle appear?"].answer == "From the start"


def test_questions_about_a_moment(view: View) -> None:
    for question in _answers(view, "digit_at").values():
        seconds = float(next(word for word in question.text.split() if word[0].isdigit()))
        if abs(seconds - 2.0) > 0.5 and abs(seconds - 5.0) > 0.5:
            assert question.answer == ("7" if 2.0 <= seconds < 5.0 else "None")
    for question in _answers(view, "where_at").values():
        if "red" in question.text:
            seconds = float(next(word for word in question.text.split() if word[0].isdigit()))
            x = 20 + 60 * seconds / 6.2
            assert question.answer == ("Left" if x < 33 else "Center" if x < 67 else "Right")


def test_what_is_not_seen_is_not_asked_about(scene: Scene) -> None:
    early = View(scene, [0.0, 0.5, 1.0, 1.5])
    assert [thing.shape for thing in early.things] == ["circle"]
    assert ask("digit", early, random.Random(0)) is None
    assert not early.is_whole(scene.things[0])
    assert ask("direction", early, random.Random(0)) is None


def test_where() -> None:
    scene = make_scene(0)
    assert grid_name(scene, 1, 1) == "top left"
    assert grid_name(scene, scene.width / 2, scene.height / 2) == "center"
    assert grid_name(scene, scene.width / 3, 1) is None


def test_two_videos(scene: Scene, view: View) -> None:
    green = View(
        replace(scene, things=(_thing("cross", "green", "left", vanishes_seconds=4.0),)), [i * 0.25 for i in range(16)]
    )
    asked = [ask_of_two((view, green), random.Random(seed)) for seed in range(4000)]
    answers = {question.text: question.answer for question in asked if question is not None}
    assert answers["Which video shows a green cross?"] == "The second video"
    assert answers["Which video shows a red circle?"] == "The first video"
    assert answers["In which video does a shape move left?"] == "The second video"
    assert answers["Which video is longer?"] == "The first video"
    assert answers["In the second video, which way does the green cross move?"] == "Left"
    assert "Neither video" in answers.values()


def test_picture_and_video(scene: Scene, view: View) -> None:
    same, other = picture_of(scene.things[0], 1), picture_of(_thing("cross", "black", "still"), 2)
    of_same = [ask_of_picture(same, view, random.Random(seed)) for seed in range(200)]
    of_other = [ask_of_picture(other, view, random.Random(seed)) for seed in range(200)]
    about_both = {q.text: q.answer for q in of_same if q is not None and q.kind == "picture_and_video"}
    assert about_both["Which way does the shape in the picture move?"] == "Right"
    assert about_both["Does the shape in the picture appear in the video?"] == "Yes"
    assert {q.answer for q in of_other if q is not None and q.kind == "picture_and_video"} == {"No"}
    alone = ask_of_picture(make_picture_scene(1), None, random.Random(0))
    assert alone is not None
    assert alone.kind == "picture"


def test_conversations_go_on_about_one_thing(view: View) -> None:
    for seed in range(30):
        first, *others = ask_in_turn(view, random.Random(seed), 4)
        assert " it" not in first.text.removesuffix("?").split(" at ")[0] or "shape is it" in first.text
        assert others
        assert all(" it " in f" {q.text.rstrip('?.')} " and q.thing == first.thing for q in others)


def test_every_kind_is_asked() -> None:
    kinds = set()
    for seed in range(200):
        scene = make_scene(seed)
        view = View(scene, [i / scene.frames_per_second for i in range(0, scene.num_frames, 3)])
        questions = ask_some(view, random.Random(seed), 10, WEIGHTS)
        assert len({question.text for question in questions}) == len(questions)
        kinds |= {question.kind for question in questions}
        assert all(is_right(q, q.answer) for q in questions if q.seconds is None)
    assert kinds == {
        *("describe", "count", "exists", "digit", "digit_at", "first", "colour", "shape", "direction"),
        *("when", "where_at", "where_edge"),
    }


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("At 3.1 seconds", True),
        ("at 3.6 seconds.", True),
        ("At 3.7 seconds", False),
        ("At nan seconds", False),
        ("3.1", False),
        ("From the start", False),
        ("", False),
    ],
)
def test_times_are_right_within_the_tolerance(answer: str, right: bool) -> None:
    assert is_right(Question("when", "?", "At 3.2 seconds", 3.1), answer) is right


def test_words_are_right_or_wrong() -> None:
    question = Question("describe", "?", "A red circle moves left. A blue star grows.")
    assert is_right(question, "A blue star grows. A red circle moves left.")
    assert not is_right(question, "A blue star grows.")
    assert not is_right(question, "A blue star grows. A red circle moves right.")
    assert is_right(Question("colour", "?", "Red"), " red. ")
    assert not is_right(Question("colour", "?", "Red"), "Red and blue")


def test_lists_say_what_is_seen_when(scene: Scene) -> None:
    view = View(scene, [0.0, 0.5, 2.5, 3.0, 3.5, 4.0, 6.5, 7.0])
    said = transcribe(view)
    assert said is not None
    assert said.answer == (
        "0.2: red circle left. 2.8: red circle center, digit 7. 3.8: red circle center, digit 7, blue star bottom. "
        "6.8: blue star bottom."
    )
    looks = list_looks(view)
    assert looks is not None
    assert looks.answer == "Circle: red. Star: blue."
    assert transcribe(View(scene, [i / 10 for i in range(80)])) is None
