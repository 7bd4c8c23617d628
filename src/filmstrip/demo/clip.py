"""A short clip with something to see at known times, encoded on the spot; knows no model."""

from __future__ import annotations

import math
from pathlib import Path

import av
from PIL import Image, ImageDraw

WIDTH, HEIGHT, FRAMES_PER_SECOND = 640, 360, 24
_COLOURS = ("crimson", "seagreen", "royalblue")


def make_clip(path: str | Path, *, duration_seconds: float = 8.0) -> Path:
    """Write an H.264 clip: a disc crosses the picture, changing its colour twice, while a clock counts seconds."""
    path = Path(path)
    num_frames = round(duration_seconds * FRAMES_PER_SECOND)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_image(_picture(index, num_frames))))
        container.mux(stream.encode(None))
    return path


def _picture(index: int, num_frames: int) -> Image.Image:
    progress = index / max(num_frames - 1, 1)
    image = Image.new("RGB", (WIDTH, HEIGHT), "ivory")
    draw = ImageDraw.Draw(image)
    for x in range(0, WIDTH, 40):
        draw.line((x, HEIGHT - 60, x + 20, HEIGHT), fill="tan", width=6)
    x = 60 + progress * (WIDTH - 120)
    y = HEIGHT / 2 - 70 * math.sin(progress * 3 * math.pi)
    colour = _COLOURS[min(int(progress * len(_COLOURS)), len(_COLOURS) - 1)]
    draw.ellipse((x - 36, y - 36, x + 36, y + 36), fill=colour, outline="black", width=3)
    draw.text((16, 12), f"{index / FRAMES_PER_SECOND:4.1f} s", fill="black", font_size=32)
    return image
