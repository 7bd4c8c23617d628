"""A seed in, a scene with known facts and its frames out; knows no files, no questions and no model.

A scene has one to three things (shapes, and sometimes a digit) on a varied, muted background. Each thing is there for a part
of the clip, and meanwhile moves in one of eight directions, stays, grows or shrinks; it may change its colour once. Things
differ in colour and do not cover each other, so that every question about them has one answer.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 32),
    "orange": (250, 136, 10),
    "yellow": (246, 226, 36),
    "green": (24, 158, 52),
    "blue": (34, 70, 226),
    "purple": (150, 44, 190),
    "white": (250, 250, 250),
    "black": (10, 10, 12),
}
"""RGB of the colours; a scene's own differ from these by a few levels."""

SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = tuple("0123456789")

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
"""Steps on the picture, x to the right and y down."""

MOTIONS = (*DIRECTIONS, "still", "grow", "shrink")

_ASPECTS = ((1, 1), (4, 3), (16, 9), (3, 2), (3, 4), (9, 16))
_SHORT_SIDES = (96, 112, 128, 144, 160, 192, 240)
_SHORT_SIDE_WEIGHTS = (4, 4, 4, 3, 3, 2, 1)
_FRAME_RATES = (8, 10, 12, 15, 24, 25, 30)
_FRAME_RATE_WEIGHTS = (5, 5, 4, 3, 2, 1, 1)
_MIN_SHOWN_SECONDS = 1.2
_SUPERSAMPLING = 3
_MAX_PLACING_ATTEMPTS = 60


@dataclass(frozen=True)
class Thing:
    """One shape or digit; places are (x, y) pixels of its centre, sizes its diameter in pixels, times in seconds."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    motion: str
    start: tuple[float, float]
    end: tuple[float, float]
    start_size: float
    end_size: float
    appears_seconds: float
    vanishes_seconds: float
    turn_degrees: float = 0.0
    later_colour: str | None = None
    later_rgb: tuple[int, int, int] | None = None
    changes_seconds: float = math.inf

    @property
    def is_digit(self) -> bool:
        """Whether it is a digit, not a shape."""
        return self.shape in DIGITS

    def is_shown(self, seconds: float) -> bool:
        """Whether it is in the picture at that time."""
        return self.appears_seconds <= seconds < self.vanishes_seconds

    def place(self, seconds: float) -> tuple[float, float, float]:
        """(x, y, diameter) in pixels at that time; its motion fills the time that it is shown."""
        part = (seconds - self.appears_seconds) / (self.vanishes_seconds - self.appears_seconds)
        part = min(max(part, 0.0), 1.0)
        (x0, y0), (x1, y1) = self.start, self.end
        size = self.start_size + part * (self.end_size - self.start_size)
        return x0 + part * (x1 - x0), y0 + part * (y1 - y0), size

    def colour_at(self, seconds: float) -> str:
        """Name of its colour at that time."""
        return self.later_colour if self.later_colour and seconds >= self.changes_seconds else self.colour


@dataclass(frozen=True)
class Background:
    """A muted pattern; ``noise`` is the deviation of the grain that each frame gets anew, in levels of 255."""

    kind: str
    rgb: tuple[int, int, int]
    other_rgb: tuple[int, int, int]
    scale: float
    angle: float
    noise: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows. ``things`` stand in the order in which they appear, then from left to right."""

    seed: int
    width: int
    height: int
    frames_per_second: int
    num_frames: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def duration_seconds(self) -> float:
        """Length of the clip."""
        return self.num_frames / self.frames_per_second

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """The things that are not digits."""
        return tuple(thing for thing in self.things if not thing.is_digit)

    @property
    def digits(self) -> tuple[Thing, ...]:
        """The things that are digits."""
        return tuple(thing for thing in self.things if thing.is_digit)


def make_scene(seed: int, *, size: tuple[int, int] | None = None, duration_seconds: float | None = None) -> Scene:
    """The scene of ``seed``; ``size`` (width, height) and ``duration_seconds`` replace what the seed would choose."""
    rng = random.Random(f"scene {seed}")
    width, height = _size(rng)
    if size is not None:
        width, height = size
    rate = rng.choices(_FRAME_RATES, _FRAME_RATE_WEIGHTS)[0]
    duration = 2 + 18 * rng.random() ** 2.2
    num_frames = round((duration if duration_seconds is None else duration_seconds) * rate)
    scene = Scene(seed, width, height, rate, num_frames, _background(rng), ())
    things: list[Thing] = []
    if rng.random() < 0.3:
        things.extend(_digits(rng, scene))
    num_shapes = rng.choices((1, 2, 3), (3, 4, 3))[0] - (1 if things else 0)
    for _ in range(num_shapes):
        thing = _shape(rng, scene, things)
        if thing is not None:
            things.append(thing)
    things.sort(key=lambda thing: (round(thing.appears_seconds, 3), thing.start[0]))
    return replace(scene, things=tuple(things))


def make_picture_scene(seed: int) -> Scene:
    """A scene of one frame with one still shape in it: what a picture shows."""
    rng = random.Random(f"picture {seed}")
    width, height = _size(rng)
    scene = Scene(seed, width, height, 1, 1, _background(rng), ())
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    return replace(scene, things=(_still(rng, scene, shape, colour),))


def picture_of(thing: Thing, seed: int) -> Scene:
    """A picture of the same kind of thing (shape and first colour) at another place on another background."""
    rng = random.Random(f"picture of {seed}")
    width, height = _size(rng)
    scene = Scene(seed, width, height, 1, 1, _background(rng), ())
    return replace(scene, things=(_still(rng, scene, thing.shape, thing.colour),))


class Painter:
    """Paints a scene's frames; the background is painted once."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._background = Image.fromarray(_paint_background(scene))
        self._grain = np.random.default_rng(scene.background.seed)

    def frame(self, index: int) -> np.ndarray:
        """Frame number ``index``, uint8 RGB (height, width, 3); the grain depends on how many were painted before."""
        seconds = index / self._scene.frames_per_second
        picture = self._background.copy()
        for thing in self._scene.things:
            if thing.is_shown(seconds):
                _paint_thing(picture, thing, seconds)
        pixels = np.asarray(picture)
        noise = self._scene.background.noise
        if noise < 0.5:
            return pixels
        grain = self._grain.normal(0.0, noise, pixels.shape[:2]).astype(np.int16)
        return np.clip(pixels + grain[:, :, None], 0, 255).astype(np.uint8)


def _size(rng: random.Random) -> tuple[int, int]:
    short = rng.choices(_SHORT_SIDES, _SHORT_SIDE_WEIGHTS)[0]
    across, down = rng.choice(_ASPECTS)
    unit = short / min(across, down)
    return round(across * unit / 2) * 2, round(down * unit / 2) * 2


def _background(rng: random.Random) -> Background:
    return Background(
        rng.choice(("plain", "gradient", "stripes", "checks", "clouds")),
        _muted(rng),
        _muted(rng),
        rng.uniform(0.08, 0.4),
        rng.uniform(0, math.pi),
        rng.choice((0.0, 2.0, 4.0, 7.0)),
        rng.getrandbits(32),
    )


def _muted(rng: random.Random) -> tuple[int, int, int]:
    """A greyish colour of medium light, so that every colour of things stands out."""
    light = rng.randint(85, 170)
    red, green, blue = (min(max(light + rng.randint(-22, 22), 0), 255) for _ in range(3))
    return red, green, blue


def _times(rng: random.Random, duration: float, *, always: float) -> tuple[float, float]:
    """When a thing appears and vanishes; infinities stand for "before the first" and "after the last frame"."""
    shortest = max(_MIN_SHOWN_SECONDS, 0.3 * duration)
    if rng.random() < always or duration < 1.5 * shortest:
        return 0.0, duration
    appears = rng.uniform(0.12 * duration, duration - shortest) if rng.random() < 0.65 else 0.0
    vanishes = duration
    if appears == 0.0 or rng.random() < 0.3:
        low = appears + shortest
        vanishes = rng.uniform(low, 0.9 * duration) if low < 0.9 * duration else duration
    return appears, vanishes


def _shape(rng: random.Random, scene: Scene, others: list[Thing]) -> Thing | None:
    """A shape that keeps clear of ``others``, or None if there is no room for one."""
    used = {thing.colour for thing in others} | {thing.later_colour for thing in others}
    colour = rng.choice([name for name in COLOURS if name not in used])
    shape = rng.choice(SHAPES)
    for _ in range(_MAX_PLACING_ATTEMPTS):
        motion = rng.choices(MOTIONS, [5] * len(DIRECTIONS) + [10, 5, 5])[0]
        thing = _moving(rng, scene, shape, colour, motion, crowded=bool(others))
        if thing is not None and all(_keeps_clear(thing, other, scene.duration_seconds) for other in others):
            return _with_colour_change(rng, thing, used | {colour})
    return None


def _moving(rng: random.Random, scene: Scene, shape: str, colour: str, motion: str, *, crowded: bool) -> Thing | None:
    short = min(scene.width, scene.height)
    appears, vanishes = _times(rng, scene.duration_seconds, always=0.45)
    size = short * rng.uniform(0.24, 0.34 if crowded else 0.42)
    start_size = end_size = size
    if motion == "grow":
        start_size, end_size = 0.2 * short, short * rng.uniform(0.42, 0.55)
    elif motion == "shrink":
        start_size, end_size = short * rng.uniform(0.42, 0.55), 0.2 * short
    margin = max(start_size, end_size) / 2 + 1
    step_x, step_y = DIRECTIONS.get(motion, (0, 0))
    far = short * rng.uniform(0.35, 0.62)
    if step_x and step_y:
        far *= 0.85
    shift_x, shift_y = far * step_x, far * step_y
    low_x, high_x = margin + max(0.0, -shift_x), scene.width - margin - max(0.0, shift_x)
    low_y, high_y = margin + max(0.0, -shift_y), scene.height - margin - max(0.0, shift_y)
    if low_x > high_x or low_y > high_y:
        return None
    x, y = rng.uniform(low_x, high_x), rng.uniform(low_y, high_y)
    turn = rng.uniform(-14, 14)
    return Thing(
        *(shape, colour, _jittered(rng, colour), motion, (x, y), (x + shift_x, y + shift_y)),
        *(start_size, end_size, appears, vanishes, turn),
    )


def _still(rng: random.Random, scene: Scene, shape: str, colour: str) -> Thing:
    size = min(scene.width, scene.height) * rng.uniform(0.26, 0.6)
    x, y = (rng.uniform(size / 2 + 1, side - size / 2 - 1) for side in (scene.width, scene.height))
    turn = rng.uniform(-14, 14)
    return Thing(
        *(shape, colour, _jittered(rng, colour), "still", (x, y), (x, y)),
        *(size, size, 0.0, scene.duration_seconds, turn),
    )


def _with_colour_change(rng: random.Random, thing: Thing, used: set[str | None]) -> Thing:
    shown = thing.vanishes_seconds - thing.appears_seconds
    free = [name for name in COLOURS if name not in used]
    if rng.random() > 0.2 or shown < 2 * _MIN_SHOWN_SECONDS or not free:
        return thing
    later = rng.choice(free)
    at = thing.appears_seconds + shown * rng.uniform(0.35, 0.65)
    return replace(thing, later_colour=later, later_rgb=_jittered(rng, later), changes_seconds=at)


def _digits(rng: random.Random, scene: Scene) -> list[Thing]:
    """One to three digits at one place, one after the other."""
    duration = scene.duration_seconds
    num_digits = min(rng.choice((1, 2, 3)), int(duration / _MIN_SHOWN_SECONDS))
    short = min(scene.width, scene.height)
    size = short * rng.uniform(0.42, 0.6)
    x, y = (rng.uniform(size / 2 + 1, side - size / 2 - 1) for side in (scene.width, scene.height))
    colour = rng.choice(list(COLOURS))
    rgb, turn = _jittered(rng, colour), rng.uniform(-8, 8)
    bounds = [0.0, *(duration * (i + rng.uniform(-0.15, 0.15)) / num_digits for i in range(1, num_digits)), duration]
    if num_digits == 1 and duration > 3 * _MIN_SHOWN_SECONDS and rng.random() < 0.6:
        bounds = [duration * rng.uniform(0.1, 0.4), duration * rng.uniform(0.7, 0.95)]
    names = rng.sample(DIGITS, num_digits)
    return [
        Thing(name, colour, rgb, "still", (x, y), (x, y), size, size, start, end, turn)
        for name, start, end in zip(names, bounds, bounds[1:], strict=False)
    ]


def _keeps_clear(thing: Thing, other: Thing, duration: float) -> bool:
    """Whether the two never touch; looked at 12 times."""
    for seconds in np.linspace(0, duration, 12):
        x, y, size = thing.place(seconds)
        other_x, other_y, other_size = other.place(seconds)
        if math.hypot(x - other_x, y - other_y) < 0.56 * (size + other_size):
            return False
    return True


def _jittered(rng: random.Random, colour: str) -> tuple[int, int, int]:
    red, green, blue = (min(max(level + rng.randint(-10, 10), 0), 255) for level in COLOURS[colour])
    return red, green, blue


def _paint_background(scene: Scene) -> np.ndarray:
    background = scene.background
    short = min(scene.width, scene.height)
    y, x = np.mgrid[0 : scene.height, 0 : scene.width].astype(np.float32)
    along = (x * math.cos(background.angle) + y * math.sin(background.angle)) / short
    across = (y * math.cos(background.angle) - x * math.sin(background.angle)) / short
    if background.kind == "plain":
        weight = np.zeros_like(along)
    elif background.kind == "gradient":
        weight = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
    elif background.kind == "stripes":
        weight = (np.floor(along / background.scale) % 2) * 0.6
    elif background.kind == "checks":
        weight = ((np.floor(along / background.scale) + np.floor(across / background.scale)) % 2) * 0.6
    else:
        coarse = np.random.default_rng(background.seed).random((7, 7), np.float32)
        clouds = Image.fromarray((coarse * 255).astype(np.uint8)).resize(
            (scene.width, scene.height), Image.Resampling.BICUBIC
        )
        weight = np.asarray(clouds, np.float32) / 255
    first, second = (np.array(rgb, np.float32) for rgb in (background.rgb, background.other_rgb))
    return (first + weight[:, :, None] * (second - first)).clip(0, 255).astype(np.uint8)


def _paint_thing(picture: Image.Image, thing: Thing, seconds: float) -> None:
    x, y, size = thing.place(seconds)
    rgb = thing.later_rgb if thing.later_rgb is not None and seconds >= thing.changes_seconds else thing.rgb
    half = math.ceil(size / 2) + 2
    left, top = math.floor(x) - half, math.floor(y) - half
    side = 2 * half + 1
    mask = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    centre = ((x - left) * _SUPERSAMPLING, (y - top) * _SUPERSAMPLING)
    if thing.is_digit:
        _draw_digit(mask, thing, centre, size * _SUPERSAMPLING)
    else:
        _draw_shape(ImageDraw.Draw(mask), thing, centre, size * _SUPERSAMPLING / 2)
    picture.paste(rgb, (left, top), mask.reduce(_SUPERSAMPLING))


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, centre: tuple[float, float], radius: float) -> None:
    x, y = centre
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    turn = math.radians(thing.turn_degrees)
    for polygon in _polygons(thing.shape):
        corners = [
            (
                x + radius * (px * math.cos(turn) - py * math.sin(turn)),
                y + radius * (px * math.sin(turn) + py * math.cos(turn)),
            )
            for px, py in polygon
        ]
        draw.polygon(corners, fill=255)


def _polygons(shape: str) -> list[list[tuple[float, float]]]:
    """Corners of a shape in a circle of radius 1, y down."""
    if shape == "square":
        return [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]]
    if shape == "triangle":
        return [[(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)]]
    if shape == "cross":
        return [
            [(-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95)],
            [(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)],
        ]
    points = []
    for corner in range(10):
        radius = 1.0 if corner % 2 == 0 else 0.42
        angle = math.pi * corner / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return [points]


def _draw_digit(mask: Image.Image, thing: Thing, centre: tuple[float, float], size: float) -> None:
    font = ImageFont.load_default(size * 1.15)
    ImageDraw.Draw(mask).text(centre, thing.shape, fill=255, font=font, anchor="mm", stroke_width=max(size / 40, 1))
    turned = mask.rotate(thing.turn_degrees, Image.Resampling.BILINEAR, center=centre)
    mask.paste(turned)
