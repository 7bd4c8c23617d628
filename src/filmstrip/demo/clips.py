"""A scene in, an encoded clip or picture out; knows no questions and no model."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from filmstrip.demo.scenes import Painter, Scene


def encode_scene(scene: Scene, *, frame_order: Sequence[int] | None = None, codec: str | None = None) -> bytes:
    """The clip of a scene: H.264 in MP4 or VP9 in WebM, at a quality that the scene's seed chooses.

    ``frame_order`` shows other frames than the scene's own at each time: indices of the scene's frames, one for each frame
    of the clip. ``codec`` is "h264" or "vp9"; left out, the seed chooses.
    """
    painter = Painter(scene)
    frames = [painter.frame(index) for index in range(scene.num_frames)]
    order = range(scene.num_frames) if frame_order is None else frame_order
    rng = random.Random(f"codec {scene.seed}")
    chosen = rng.choices(("h264", "vp9"), (3, 1))[0]
    quality = rng.randint(18, 30)
    return encode_frames([frames[index] for index in order], scene.frames_per_second, codec or chosen, quality)


def encode_frames(frames: Sequence[np.ndarray], frames_per_second: int, codec: str, quality: int) -> bytes:
    """A clip of uint8 RGB frames (height, width, 3), even sides; ``quality`` is the codec's constant rate factor."""
    file = io.BytesIO()
    height, width = frames[0].shape[:2]
    if codec == "h264":
        container_format, encoder, options = "mp4", "libx264", {"preset": "veryfast", "crf": str(quality)}
    elif codec == "vp9":
        container_format, encoder = "webm", "libvpx-vp9"
        options = {"deadline": "realtime", "cpu-used": "8", "crf": str(quality + 6), "b": "0"}
    else:
        raise ValueError(f"codec must be h264 or vp9, not {codec!r}")
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(encoder, rate=Fraction(frames_per_second), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for rgb in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def encode_picture(scene: Scene) -> bytes:
    """The first frame of a scene as PNG or JPEG, which the seed chooses."""
    rng = random.Random(f"codec {scene.seed}")
    file = io.BytesIO()
    picture = Image.fromarray(Painter(scene).frame(0))
    if rng.random() < 0.5:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=rng.randint(70, 95))
    return file.getvalue()
