"""``filmstrip inspect``: a video or picture to what a model would see of it: text, JSON, PNG or HTML; loads no weights."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

from filmstrip.cli.arguments import inspect_config, inspect_item
from filmstrip.cli.inspect_page import render_page
from filmstrip.cli.options import UsageError
from filmstrip.media.contact_sheet import contact_sheet
from filmstrip.processing import inspection
from filmstrip.processing.inspection import Inspection
from filmstrip.processing.preview import is_variable_rate
from filmstrip.types import ImageMetadata, VideoMetadata

_MOST_SHOWN = 64
_NO_BREAK = "\u00a0"
_TEXT_COLUMNS = 100
_EDGES = ((36, 320), (144, 200), (400, 128))
"""Longer side of a picture, in pixels, where there are at most so many."""
_SMALLEST_EDGE = 96


def run(arguments: argparse.Namespace) -> int:
    """Inspect one item; returns 0. Raises UsageError for wrong flags and FilmstripError for what cannot be shown."""
    config, item = inspect_config(arguments), inspect_item(arguments)
    outputs = [path for path in (arguments.sheet, arguments.html) if path is not None]
    for path in outputs:
        if not path or os.path.isdir(path):
            raise UsageError(f"{path!r} is no name of a file to write")
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UsageError(f"there is no directory {os.path.dirname(path)} to write {os.path.basename(path)} into")
    if arguments.model is None:
        model = inspection.published_view(config.media, config.processor, config.engine.max_model_len)
    else:
        model = inspection.view_of_checkpoint(config)
    found = asyncio.run(inspection.inspect_item(item, model, config.media, choose_edge=_edge if outputs else None))
    name = source_name(item.url or "")
    if arguments.sheet is not None:
        with _writing(arguments.sheet):
            save_sheet(found, name, arguments.sheet)
    if arguments.html is not None:
        with _writing(arguments.html):
            Path(arguments.html).write_text(render_page(found, name, facts(found)), encoding="utf-8")
    if arguments.json:
        print(json.dumps(as_json(found, name), indent=2))
    else:
        print(as_text(found, name))
    return 0


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def source_name(url: str) -> str:
    """A short name of where the item came from: never the megabytes of a data URL, nor what may be secret in a query.

    Bytes of a file's name that are no text are spelt.
    """
    url = url.encode("utf-8", "backslashreplace").decode()
    if url[:5].lower() == "data:":
        return url[: url.find(",")][:60] if "," in url[:100] else "data URL"
    return url.partition("?")[0].rstrip("/").rpartition("/")[2] or url


def facts(found: Inspection) -> list[tuple[str, str]]:
    """What there is to say, as pairs of a word and a text."""
    item, model = found.item, found.model
    rows = [("file", _file(found)), ("picture", _picture(found)), ("settings", _settings(found))]
    plan = item.plan
    size = f"{plan.width} x {plan.height} pixels"
    if item.frame_indices:
        assert isinstance(item.metadata, VideoMetadata)
        total = item.metadata.total_num_frames
        rows.append(("seen", f"{len(plan.frame_indices)} of {total:,} frames at {size}: {item.num_tokens:,} tokens"))
    else:
        rows.append(("seen", f"{size}: {item.num_tokens:,} tokens"))
    about = "" if model.counts_exactly else "about "
    share = f"{100 * found.context_share:.1f} % of a context of {model.max_model_len:,} (--max-model-len)"
    fits = "" if found.context_share < 1 else "; it does not fit"
    words = "its times and the template's words" if item.frame_indices else "the template's words"
    rows.append(("prompt", f"{about}{found.num_prompt_tokens:,} tokens with {words}, {share}{fits}"))
    rows.extend(("note", note) for note in item.notes)
    return rows


def as_text(found: Inspection, name: str) -> str:
    """For terminals."""
    lines = [name, *(_wrapped(word, text) for word, text in facts(found))]
    item = found.item
    shown = [
        f"{index} at {seconds:.3f} s".replace(" ", _NO_BREAK)
        for index, seconds in zip(item.frame_indices, item.timestamps, strict=True)
    ]
    if len(shown) > _MOST_SHOWN:
        left_out = len(shown) - _MOST_SHOWN
        half = _MOST_SHOWN // 2
        shown = [*shown[:half], f"... {left_out} more, which --json lists ...", *shown[-half:]]
    if shown:
        lines.append(_wrapped("frames", ", ".join(shown)))
    return "\n".join(lines)


def as_json(found: Inspection, name: str) -> dict[str, object]:
    """For programs: the fields of ``POST /v1/media/plan``, and those that only make sense without a server."""
    return {
        "source": name,
        "container": found.container,
        **found.item.description(),
        "settings": found.model.name,
        "prompt_tokens": found.num_prompt_tokens,
        "prompt_tokens_exact": found.model.counts_exactly,
        "max_model_len": found.model.max_model_len,
        "context_share": found.context_share,
    }


def save_sheet(found: Inspection, name: str, path: str) -> None:
    """Write the contact sheet as a PNG."""
    thumbnails = found.thumbnails
    assert thumbnails is not None
    labels = frame_labels(found) or [f"{found.item.plan.width} x {found.item.plan.height}"]
    title = f"{name}: {dict(facts(found))['seen']}"
    contact_sheet(list(thumbnails.frames), labels, title).save(path, "PNG")


def frame_labels(found: Inspection) -> list[str]:
    """Index and time of each picture; none for an image."""
    thumbnails = found.thumbnails
    assert thumbnails is not None
    return [
        f"frame {index}, {seconds:.3f} s"
        for index, seconds in zip(thumbnails.frame_indices, thumbnails.timestamps, strict=True)
    ]


def _edge(num_frames: int) -> int:
    return next((edge for most, edge in _EDGES if num_frames <= most), _SMALLEST_EDGE)


def _wrapped(word: str, text: str) -> str:
    """A line of ``word`` and ``text``, cut between words only."""
    indent = " " * 12
    line = textwrap.fill(f"  {word:<10}{text}", _TEXT_COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
    return line.replace(_NO_BREAK, " ")


def _file(found: Inspection) -> str:
    metadata = found.item.metadata
    kind = metadata.codec if isinstance(metadata, VideoMetadata) else metadata.format
    parts = [kind or "unknown codec"]
    if found.container and found.container != kind:
        parts[0] += f" in {found.container}"
    parts.append(f"{found.item.num_bytes:,} bytes")
    if isinstance(metadata, VideoMetadata):
        parts.append("sound, which is not used" if metadata.has_audio else "no sound")
    return ", ".join(parts)


def _picture(found: Inspection) -> str:
    metadata = found.item.metadata
    if not isinstance(metadata, VideoMetadata):
        assert isinstance(metadata, ImageMetadata)
        return f"{metadata.width} x {metadata.height}"
    rate = f"{metadata.fps:.6g} frames per second"
    rate += " on average, variable" if is_variable_rate(metadata) else ", constant"
    turned = ", mirrored" if metadata.is_mirrored else ""
    turned += f", turned by {metadata.rotation_degrees} degrees" if metadata.rotation_degrees else ""
    assumed = " (assumed: none was given)" if metadata.timing_assumed else ""
    length = f"{metadata.total_num_frames:,} frames in {metadata.duration:.3f} s"
    return f"{metadata.width} x {metadata.height}{turned}, {rate}{assumed}, {length}"


def _settings(found: Inspection) -> str:
    if found.model.counts_exactly:
        return found.model.name
    return f"{found.model.name} (--model takes those of a checkpoint)"
