"""Dataclass to flags and back."""

import argparse
import dataclasses

import pytest

from filmstrip.cli.options import add_flags, field_docs, given_flags, read_flags
from filmstrip.config import EngineConfig, MediaConfig, ProcessorConfig, ServerConfig
from filmstrip.types import FrameSampling, SamplingParams


@dataclasses.dataclass(frozen=True)
class Example:
    """Settings of an example."""

    whole: int = 3
    """A whole number; 50 % of it
    on a second line."""
    real: float | None = None
    """A real number."""
    text: str = "a"
    """Some text."""
    many: tuple[str, ...] = ()
    """Several texts."""
    numbers: tuple[int, ...] = (1,)
    """Several numbers."""
    on: bool = True
    """On or off."""
    hidden: dict | None = None
    """Something that fits no flag."""


def parse(*argv: str, **options) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser.add_argument_group("example"), Example, skip={"hidden"}, **options)
    return parser.parse_args(argv)


def test_nothing_given_means_the_dataclass_decides():
    assert read_flags(parse(), Example) == Example()
    assert given_flags(parse(), Example) == {}


def test_every_type():
    argv = [
        "--whole",
        "-5",
        "--real",
        "0.5",
        "--text",
        "b c",
        "--many",
        "x",
        "--many",
        "y",
        "--numbers",
        "7",
        "--no-on",
    ]
    hidden = {"k": 1}
    expected = Example(-5, 0.5, "b c", ("x", "y"), (7,), False, hidden)
    assert read_flags(parse(*argv), Example, hidden=hidden) == expected


def test_bounds_and_choices():
    bounds = {"whole": (1, 5), "real": (0, float("inf"))}
    assert parse("--whole", "5", "--real", "0", bounds=bounds).whole == 5
    for argv, message in (
        (["--whole", "6"], "argument --whole: must be from 1 to 5, not 6"),
        (["--whole", "x"], "argument --whole: invalid int value: 'x'"),
        (["--whole", "1.5"], "argument --whole: invalid int value: '1.5'"),
        (["--real", "-1"], "argument --real: must be at least 0, not -1"),
        (["--real", "nan"], "argument --real: must be at least 0, not nan"),
        (["--text", "c"], "invalid choice: 'c'"),
    ):
        with pytest.raises(argparse.ArgumentError, match=message.replace("(", r"\(")):
            parse(*argv, bounds=bounds, choices={"text": ["a", "b"]})


def test_help_comes_from_the_fields(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--whole N A whole number; 50 % of it on a second line (default: 3)" in text
    assert "--many TEXT Several texts" in text
    assert "--no-on" in text
    assert "hidden" not in text


def test_a_type_without_a_flag_is_a_mistake_of_the_program():
    parser = argparse.ArgumentParser()
    with pytest.raises(TypeError, match="no flag can be made for a field of type"):
        add_flags(parser.add_argument_group(), Example)


@pytest.mark.parametrize(
    "kind", [EngineConfig, MediaConfig, ProcessorConfig, ServerConfig, FrameSampling, SamplingParams]
)
def test_every_setting_is_explained(kind):
    composed = {"model", "llm", "video", "image"}
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        if field.name not in composed:
            assert docs[field.name].endswith("."), field.name
