"""Parity fixtures: cases with real encoded clips, Transformers' answers to them, and the same prompts built by Filmstrip."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ProcessorConfig
from filmstrip.processing.prompt_builder import PromptBuilder
from tests.parity.clips import make_clip, make_picture

MAX_NEW_TOKENS = 32
PARITY_SITE = Path(__file__).parents[2] / ".venv" / "parity"


@dataclass(frozen=True)
class Case:
    """One conversation: ``messages`` in OpenAI form, ``files`` the media in prompt order."""

    name: str
    messages: list
    media_io_kwargs: dict | None = None
    notes: dict = field(default_factory=dict)


def video(path, **settings):
    return {"type": "video_url", "video_url": {"url": str(path), **settings}}


def image(path):
    return {"type": "image_url", "image_url": {"url": str(path)}}


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


@pytest.fixture(scope="session")
def media_files(tmp_path_factory):
    """Clips and pictures of many shapes and lengths, encoded on the spot."""
    folder = tmp_path_factory.mktemp("media")
    clips = {
        "clip": make_clip(folder / "clip.mp4", 90, 192, 128, rate=30),
        "ntsc": make_clip(folder / "ntsc.mp4", 120, 320, 180, rate="30000/1001"),
        "other": make_clip(folder / "other.mp4", 40, 128, 160, rate=8),
        "odd_count": make_clip(folder / "odd_count.mp4", 5, 160, 96, rate=2),
        "one_frame": make_clip(folder / "one_frame.mp4", 1, 160, 96, rate=25),
        "tall": make_clip(folder / "tall.mp4", 12, 64, 640, rate=4),
        "wide": make_clip(folder / "wide.mp4", 12, 640, 66, rate=4),
        "tiny": make_clip(folder / "tiny.mp4", 16, 20, 18, rate=4),
        "large": make_clip(folder / "large.mp4", 24, 720, 480, rate=6),
        "webm": make_clip(folder / "clip.webm", 48, 176, 144, rate=24, codec="libvpx-vp9"),
    }
    pictures = {
        "photo": make_picture(folder / "photo.png", 200, 150),
        "small": make_picture(folder / "small.jpg", 30, 41),
        "strip": make_picture(folder / "strip.png", 700, 60),
        "poster": make_picture(folder / "poster.webp", 900, 1200),
    }
    real = os.environ.get("FILMSTRIP_REAL_CLIPS")
    found = sorted(p for p in Path(real).iterdir() if p.suffix in {".mp4", ".mkv", ".webm"}) if real else []
    return clips | pictures | {f"real_{path.stem}": path for path in found}


@pytest.fixture(scope="session")
def cases(media_files):
    """The conversations that parity is shown on."""
    m = media_files
    made = [
        Case("text_only", [{"role": "system", "content": "Be brief."}, user("What is a film strip?")]),
        Case("image", [user(image(m["photo"]), "What is this?")]),
        Case("small_image", [user("Look: ", image(m["small"]), image(m["strip"]), "Which is wider?")]),
        Case("large_image", [user(image(m["poster"]), "Describe.")]),
        Case("video", [user(video(m["clip"]), "What happens?")]),
        Case("ntsc_video", [user(video(m["ntsc"]), "When?")]),
        Case("webm_video", [user(video(m["webm"]), "What?")]),
        Case("two_videos", [user(video(m["clip"]), "and", video(m["other"]), "Which is longer?")]),
        Case("mixed", [user(image(m["photo"]), "then", video(m["other"]), "then", image(m["small"]), "Compare.")]),
        Case("odd_count", [user(video(m["odd_count"]), "Five frames.")]),
        Case("one_frame", [user(video(m["one_frame"]), "One frame.")]),
        Case("tall", [user(video(m["tall"]), "Tall.")]),
        Case("wide", [user(video(m["wide"]), "Wide.")]),
        Case("tiny", [user(video(m["tiny"]), "Tiny.")]),
        Case("large", [user(video(m["large"]), "Large.")]),
        Case("chosen_frames", [user(video(m["ntsc"]), "Four.")], {"video": {"num_frames": 4}}),
        Case(
            "many_turns",
            [
                user(video(m["other"]), "First?"),
                {"role": "assistant", "content": "A bar moves."},
                user("And this ", image(m["photo"]), " or <this>?"),
            ],
        ),
    ]
    made += [Case(name, [user(video(path), "What?")]) for name, path in m.items() if name.startswith("real_")]
    return {case.name: case for case in made}


def decode_all(path):
    """Every frame of a clip by plain sequential decoding, and its average rate: the truth to compare with."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        frames = [
            np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in container.decode(stream)
        ]
        return np.stack(frames), float(stream.average_rate)


def reference_case(case, checkpoint):
    """What the reference process needs: template messages, and media as decoded arrays."""
    messages, media, arrays = [], [], {}
    explicit = (case.media_io_kwargs or {}).get("video", {}).get("num_frames")
    for message in case.messages:
        if isinstance(message["content"], str):
            messages.append(message)
            continue
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part)
                continue
            kind = part["type"].removesuffix("_url")
            parts.append({"type": kind})
            path, key = part[part["type"]]["url"], f"media{len(media)}"
            if kind == "image":
                arrays[key] = np.asarray(Image.open(path).convert("RGB"))
                media.append({"type": "image"})
                continue
            frames, fps = decode_all(path)
            total, indices = len(frames), None
            if explicit:
                indices = np.linspace(0, total - 1, explicit).astype(int).tolist()
            elif total == 1:  # the reference refuses one frame: it is shown twice
                indices = [0, 0]
            if indices is not None:
                frames = frames[indices]
            arrays[key] = frames
            media.append({"type": "video", "total_num_frames": total, "fps": fps, "frames_indices": indices})
        messages.append({"role": message["role"], "content": parts})
    spec = {"name": case.name, "checkpoint": checkpoint, "messages": messages, "media": media}
    return spec | {"max_new_tokens": MAX_NEW_TOKENS}, arrays


def run_reference(folder, cases, checkpoint):
    """Answers of Transformers' processor and model to all cases, by name."""
    specs = []
    for case in cases.values():
        spec, arrays = reference_case(case, checkpoint)
        np.savez(folder / f"{case.name}.npz", **arrays)
        specs.append(spec)
    run_reference_program(folder, specs)
    return {name: dict(np.load(folder / f"{name}.out.npz")) for name in cases}


def run_reference_program(folder, specs, script="reference.py"):
    """Run ``script`` where torchvision can be imported."""
    (folder / "cases.json").write_text(json.dumps(specs))
    program = Path(__file__).with_name(script)
    environment = os.environ | {"PYTHONPATH": str(PARITY_SITE)}
    result = subprocess.run(
        [sys.executable, str(program), str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]


def build_prompts(cases, checkpoint, **processor):
    """The same conversations through Filmstrip's own path, file to tokens."""

    async def build():
        config = LLMConfig(EngineConfig(checkpoint), MediaConfig(num_decode_threads=2), ProcessorConfig(**processor))
        builder = PromptBuilder(config)
        try:
            return {
                name: await builder.build(
                    case.messages, max_model_len=32768, media_io_kwargs=case.media_io_kwargs, report=lambda _: None
                )
                for name, case in cases.items()
            }
        finally:
            await builder.close()

    return asyncio.run(build())


@pytest.fixture(scope="session", params=["dense", "moe"])
def checkpoint(request, qwen3_vl_dir, qwen3_vl_moe_dir):
    return qwen3_vl_dir if request.param == "dense" else qwen3_vl_moe_dir


@pytest.fixture(scope="session")
def references(tmp_path_factory, cases, checkpoint):
    return run_reference(tmp_path_factory.mktemp("reference"), cases, checkpoint)


@pytest.fixture(scope="session")
def prompts(cases, checkpoint):
    return build_prompts(cases, checkpoint)
