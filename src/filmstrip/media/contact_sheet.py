"""Frames to what people look at: small pictures, JPEG, and one sheet with the time under each; opens and decodes nothing.

Thumbnails come out of the decoders' workers like everything else: a :class:`FramePlan` of single pixels *is* a picture, so
:func:`thumbnail_plan` asks for small frames and :func:`frames_from` reads them out of the patch matrix without a copy.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import FramePlan, PatchLayout

_PIXELS = PatchLayout(patch_size=1, temporal_patch_size=1, merge_size=1)
_GAP, _FONT_SIZE, _TITLE_FONT_SIZE = 6, 13, 16
_BACKGROUND, _INK, _FAINT = (24, 26, 31), (240, 242, 245), (170, 176, 186)
_JPEG_QUALITY = 82


def thumbnail_plan(frame_indices: Sequence[int], height: int, width: int, max_edge: int) -> FramePlan:
    """A plan for the same frames, the longer side at most ``max_edge`` pixels; never larger than ``height`` x ``width``."""
    scale = min(1.0, max_edge / max(height, width))
    return FramePlan(tuple(frame_indices), max(1, round(height * scale)), max(1, round(width * scale)), _PIXELS)


def frames_from(patches: SharedTensor, plan: FramePlan) -> np.ndarray:
    """Frames of a :func:`thumbnail_plan` that was read: uint8 (num_frames, height, width, 3), a view of ``patches``."""
    return patches.array.reshape(len(plan.frame_indices), plan.height, plan.width, 3)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """A uint8 (height, width, 3) frame as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def jpeg_url(frame: np.ndarray) -> str:
    """The same as a ``data:`` URL, for pages that load nothing from elsewhere."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(frame)).decode("ascii")


def contact_sheet(
    frames: Sequence[np.ndarray], labels: Sequence[str], title: str = "", *, num_columns: int | None = None
) -> Image.Image:
    """One picture of all ``frames`` (uint8, (height, width, 3), all of one size), in rows, each with its label under it.

    ``num_columns`` makes the sheet about as wide as high if not given. Raises ValueError without frames, or if their number
    differs from that of the labels.
    """
    if not frames or len(frames) != len(labels):
        raise ValueError(f"a contact sheet needs frames and a label for each, not {len(frames)} and {len(labels)}")
    height, width = frames[0].shape[:2]
    font, title_font = ImageFont.load_default(_FONT_SIZE), ImageFont.load_default(_TITLE_FONT_SIZE)
    cell_width = max(width, *(math.ceil(font.getlength(label)) for label in labels))
    cell_height = height + _FONT_SIZE + 2 * _GAP
    if num_columns is None:
        num_columns = math.ceil(math.sqrt(len(frames) * cell_height / cell_width))
    num_columns = max(1, min(num_columns, len(frames)))
    num_rows = math.ceil(len(frames) / num_columns)
    top = _TITLE_FONT_SIZE + 3 * _GAP if title else _GAP
    sheet_width = max(num_columns * (cell_width + _GAP), math.ceil(title_font.getlength(title)) + _GAP) + _GAP
    sheet = Image.new("RGB", (sheet_width, top + num_rows * cell_height + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill=_INK, font=title_font)
    for place, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        row, column = divmod(place, num_columns)
        left, upper = _GAP + column * (cell_width + _GAP), top + row * cell_height
        sheet.paste(Image.fromarray(frame), (left, upper))
        draw.text((left, upper + height + _GAP // 2), label, fill=_FAINT, font=font)
    return sheet
