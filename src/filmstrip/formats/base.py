"""What a format's translation says of a checkpoint: the files that Transformers would have, and how messages are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from filmstrip.errors import ModelLoadError
from filmstrip.formats.source import Source


@dataclass(frozen=True)
class Translation:
    """A checkpoint as Transformers would have it; the default is one that is so already."""

    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON files by name, in place of the checkpoint's own or missing ones."""
    control_tokens: tuple[str, ...] = ()
    """Tokens that prompts are written with and that the checkpoint's tokenizer may lack: only media stand in their place."""
    media_marks: Mapping[str, str] = field(default_factory=dict)
    """What stands for a picture or a video in a message, by modality, where the format's chat templates take a message as
    one string; empty where they take a list of parts."""
    chat_template: str | None = None
    """For checkpoints that bring none."""
    vision_tower: Source | None = None
    """Where the vision tower's weights are if the checkpoint's own files have none."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of config.json; KeyError for a checkpoint that is not translated."""
        return self.files["config.json"]

    @property
    def architecture(self) -> str:
        """The architecture of Transformers that serves it; KeyError for a checkpoint that is not translated."""
        return self.config["architectures"][0]


def refuse_fields(fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ModelLoadError if a field of config.json, where it is there, has another value than those ``allowed`` for it."""
    for name, values in allowed.items():
        if name in fields and fields[name] not in values:
            listed = " or ".join(map(repr, values))
            raise ModelLoadError(
                f"config.json sets {name} to {fields[name]!r}; only {listed} is supported for this format",
                param="model",
            )


def text_fields(fields: Mapping[str, Any], model_types: Mapping[str, str], architecture: str) -> dict[str, Any]:
    """The text model's configuration: ``fields`` without what belongs to a program that saved them.

    ``model_types`` has the supported text architectures and Transformers' name for each; ModelLoadError for others.
    """
    if architecture not in model_types:
        raise ModelLoadError(
            f"the text model of this checkpoint is {architecture or 'not named'} (config.json); supported for this format "
            f"are {', '.join(sorted(model_types))}",
            param="model",
        )
    if "quantization_config" in fields:
        method = (fields["quantization_config"] or {}).get("quant_method", "unnamed")
        raise ModelLoadError(
            f"the text model is quantised ({method}), which is not supported; use the checkpoint in bfloat16 or float32",
            param="model",
        )
    kept = {name: value for name, value in fields.items() if not name.startswith("_") and name not in _OF_PROGRAMS}
    return kept | {"model_type": model_types[architecture]}


_OF_PROGRAMS = frozenset({"architectures", "attn_implementation", "auto_map", "transformers_version", "use_cache"})
"""Fields that say how a checkpoint was saved or run, not what it is."""
