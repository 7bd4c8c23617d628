"""A checkpoint's name in, its small files as text or JSON out, from a local directory or the hub; knows no model family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from filmstrip.errors import ModelLoadError


@dataclass(frozen=True)
class Source:
    """Where files are: a directory or a hub id, a branch, tag or commit of it, and a folder in it."""

    model: str
    revision: str | None = None
    subfolder: str = ""

    def text(self, name: str) -> str | None:
        """The file's text, or None where there is no such file. Raises ModelLoadError where there is no such checkpoint."""
        try:
            path = cached_file(
                self.model,
                name,
                revision=self.revision,
                subfolder=self.subfolder,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=True,
            )
        except (OSError, ValueError) as error:
            raise ModelLoadError(
                f"cannot read {name} of {self}: {error}. Give a directory with a checkpoint or a hub id.",
                param="model",
            ) from error
        return None if path is None else Path(path).read_text(encoding="utf-8")

    def json(self, name: str) -> dict[str, Any]:
        """The file's object, or an empty one where there is no such file."""
        return parse_json(self.text(name), f"{name} of {self}")

    def inside(self, folder: str) -> Source:
        """A folder of this checkpoint; ModelLoadError for one outside of it."""
        parts = Path(folder).parts
        if ".." in parts or Path(folder).is_absolute():
            raise ModelLoadError(f"{folder!r} is not a folder inside {self}", param="model")
        return Source(self.model, self.revision, str(Path(self.subfolder, *parts)))

    def __str__(self) -> str:
        return repr(f"{self.model}/{self.subfolder}" if self.subfolder else self.model)


def parse_json(text: str | None, what: str) -> dict[str, Any]:
    """The object that ``text`` holds, an empty one for None; ModelLoadError naming ``what`` if it holds none."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelLoadError(f"{what} is not valid JSON: {error}", param="model") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what} must hold a JSON object", param="model")
    return value
