"""Small JSON and text files beside the weights, from a local directory or the hub; knows no model family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from filmstrip.errors import ModelLoadError


class CheckpointFiles:
    """Reads configuration files of one checkpoint.

    ``model`` is a directory or a hub id; ``revision`` a branch, tag or commit of the hub repository.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.model, self.revision = model, revision

    def text(self, name: str) -> str | None:
        """The file's text, or None where the checkpoint has no such file."""
        try:
            path = cached_file(
                self.model,
                name,
                revision=self.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=True,
            )
        except (OSError, ValueError) as error:
            raise ModelLoadError(
                f"cannot read {name} of {self.model!r}: {error}. Give a directory with a checkpoint or a hub id.",
                param="model",
            ) from error
        return None if path is None else Path(path).read_text(encoding="utf-8")

    def json(self, name: str) -> dict[str, Any]:
        """The file's object, or an empty one where the checkpoint has no such file."""
        text = self.text(name)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ModelLoadError(f"{name} of {self.model!r} is not valid JSON: {error}", param="model") from error
        if not isinstance(value, dict):
            raise ModelLoadError(f"{name} of {self.model!r} must hold a JSON object", param="model")
        return value

    def model_config(self) -> dict[str, Any]:
        """The fields of ``config.json`` that describe the model; of one made of several, those of the one that answers."""
        config = self.json("config.json")
        return config.get("thinker_config") or config

    def processor_section(self, section: str, legacy_name: str) -> dict[str, Any]:
        """A preprocessor's settings: its own file, or its section of ``processor_config.json`` (Transformers 5)."""
        return self.json(legacy_name) or self.json("processor_config.json").get(section, {})
