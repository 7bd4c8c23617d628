"""Clips whose frames carry their number as black and white bars, so that a test can read which frame it was given."""

import subprocess

import av
import numpy as np

NUM_BITS = 10


def numbered_frame(number, width, height):
    """uint8 RGB: ``NUM_BITS`` bars over the whole height, the lowest bit left, on which a fine pattern moves."""
    image = np.full((height, width, 3), 128, np.uint8)
    edges = np.linspace(0, width, NUM_BITS + 1).astype(int)
    for bit in range(NUM_BITS):
        image[:, edges[bit] : edges[bit + 1]] = 235 if number >> bit & 1 else 20
    y = (number * 3) % max(height - 4, 1)
    image[y : y + 3] = image[y : y + 3] // 2 + 60
    return image


def read_number(image):
    """The number drawn into a frame, from the middles of its bars."""
    width = image.shape[1]
    edges = np.linspace(0, width, NUM_BITS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).astype(int)
    bars = np.median(image[:, middles].mean(-1), axis=0)
    return sum(1 << bit for bit, value in enumerate(bars) if value > 128)


def encode(path, *arguments, num_frames=60, width=160, height=96, rate="25", first=0):
    """Encode numbered frames with ffmpeg; ``arguments`` are those of the output. Returns ``path``."""
    frames = b"".join(numbered_frame(first + i, width, height).tobytes() for i in range(num_frames))
    ffmpeg(
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"),
        *arguments,
        str(path),
        stdin=frames,
    )
    return path


def ffmpeg(*arguments, stdin=None):
    """Run ffmpeg, failing with what it says."""
    command = ["ffmpeg", "-v", "error", "-y", *map(str, arguments)]
    result = subprocess.run(command, input=stdin, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()[-2000:]


def has_encoder(name):
    """Whether this ffmpeg has the encoder."""
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True, check=True).stdout
    return f" {name} " in listed


def decode_sequentially(path):
    """Every frame as plain decoding from start to end gives it, and their presentation times in seconds."""
    frames, times = [], []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        for frame in container.decode(stream):
            frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            times.append(frame.time)
    return frames, times
