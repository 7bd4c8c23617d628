"""What comes with the package: the demo model, clips that it was not trained on, and questions about them.

python -m filmstrip.demo.bundled CHECKPOINT      put a trained model and the clips into the package
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from filmstrip.demo.clips import encode_scene
from filmstrip.demo.scenes import Scene, make_scene

MODEL_NAME = "filmstrip-demo"
MODEL = Path(__file__).parent / "bundle" / "model"
CLIPS = Path(__file__).parent / "bundle" / "clips"

_SIZE = (320, 180)


@dataclass(frozen=True)
class DemoQuestion:
    """A question about one clip or several; ``truth`` is what really happens in them."""

    clips: tuple[str, ...]
    text: str
    truth: str


SEEDS = {"first.mp4": 3_000_000_091, "second.mp4": 3_000_000_359}
"""Scenes of the clips; seeds from 3,000,000,000 are neither for training nor for measuring."""

QUESTIONS = (
    DemoQuestion(("first.mp4",), "When does the red square appear?", "at 3.4 seconds"),
    DemoQuestion(("second.mp4",), "Which way does the red circle move?", "right"),
    DemoQuestion(("first.mp4", "second.mp4"), "Which video shows a green star?", "the second one"),
)


def scene_of(clip: str) -> Scene:
    """What a bundled clip shows."""
    return make_scene(SEEDS[clip], size=_SIZE)


def main() -> None:
    """Write the bundle."""
    parser = argparse.ArgumentParser(prog="python -m filmstrip.demo.bundled", description=main.__doc__)
    parser.add_argument("checkpoint", type=Path, help="a trained model, as filmstrip.demo.train writes it")
    arguments = parser.parse_args()
    for folder in (MODEL, CLIPS):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(arguments.checkpoint, MODEL, copy_function=shutil.copyfile)
    CLIPS.mkdir(parents=True)
    for name in SEEDS:
        (CLIPS / name).write_bytes(encode_scene(scene_of(name), codec="h264"))


if __name__ == "__main__":
    main()
