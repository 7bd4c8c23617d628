"""Small JSON and text files beside the weights, from a local directory or the hub, as Transformers would have them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from filmstrip.errors import ModelLoadError
from filmstrip.formats.base import Translation
from filmstrip.formats.registry import translate
from filmstrip.formats.source import Source, parse_json


class CheckpointFiles:
    """Reads configuration files of one checkpoint; those of other formats come translated.

    ``model`` is a directory or a hub id; ``revision`` a branch, tag or commit of the hub repository.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.model, self.revision = model, revision
        self._source = Source(model, revision)

    @cached_property
    def translation(self) -> Translation:
        """What is to be known of the checkpoint's format; ModelLoadError if it cannot be served."""
        if self.text("config.json") is None:
            raise ModelLoadError(f"{self.model!r} has no config.json, so it is no checkpoint", param="model")
        return translate(self._own_json("config.json"), self._source)

    def text(self, name: str) -> str | None:
        """The file's text, or None where the checkpoint has no such file."""
        return self._source.text(name)

    def json(self, name: str) -> dict[str, Any]:
        """The file's object, or an empty one where the checkpoint has no such file."""
        translated = self.translation.files.get(name)
        return self._own_json(name) if translated is None else dict(translated)

    def model_config(self) -> dict[str, Any]:
        """The fields of ``config.json`` that describe the model; of one made of several, those of the one that answers."""
        config = self.json("config.json")
        return config.get("thinker_config") or config

    def processor_section(self, section: str, legacy_name: str) -> dict[str, Any]:
        """A preprocessor's settings: its own file, or its section of ``processor_config.json`` (Transformers 5)."""
        return self.json(legacy_name) or self.json("processor_config.json").get(section, {})

    def _own_json(self, name: str) -> dict[str, Any]:
        return parse_json(self.text(name), f"{name} of {self.model!r}")
