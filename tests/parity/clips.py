"""Moving pictures with texture, edges and noise, encoded with a real codec."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image


def picture(width, height, t, rng):
    """RGB uint8 (height, width, 3): gradients, a moving bar and fine noise, so that every resize step matters."""
    y, x = np.mgrid[0:height, 0:width]
    r = (x * 255 // max(width - 1, 1) + 3 * t) % 256
    g = (y * 255 // max(height - 1, 1)) % 256
    b = ((x // 7 + y // 5 + t) % 2) * 200
    image = np.stack([r, g, b], -1)
    left = (t * 5) % width
    image[:, left : left + max(width // 10, 1)] = (250, 240, 20)
    return np.clip(image + rng.integers(-12, 13, image.shape), 0, 255).astype(np.uint8)


def make_picture(path, width, height, seed=0):
    """Save one picture; the file name's ending chooses the format."""
    Image.fromarray(picture(width, height, 3, np.random.default_rng(seed))).save(path, quality=95)
    return path


def make_clip(path, num_frames, width, height, *, rate, codec="libx264", seed=0):
    """Encode ``num_frames`` pictures at ``rate`` frames per second."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.options = {"g": "24", "bf": "2", "crf": "18"}
        for t in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(width, height, t, rng), "rgb24")))
        container.mux(stream.encode(None))
    return path
