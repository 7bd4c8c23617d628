"""A checkpoint of another format in, the family that it is translated to in memory out; knows no format's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from filmstrip.errors import ModelLoadError
from filmstrip.formats.base import Translation
from filmstrip.formats.registry import translate
from filmstrip.formats.source import Source
from filmstrip.models.attention_interface import ATTENTION_NAME
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.text import paged_text
from filmstrip.models.vision_text import VisionTextModel

Complete = Callable[[Any, list[str]], list[str]]


def read_translation(checkpoint: Checkpoint) -> Translation:
    """The checkpoint's translation; ModelLoadError for what it cannot express."""
    source = Source(checkpoint.model, checkpoint.revision)
    return translate(source.json("config.json"), source)


def load_translated(
    checkpoint: Checkpoint,
    translation: Translation,
    module_class: Any,
    family: type[VisionTextModel],
    complete: Complete | None = None,
) -> VisionTextModel:
    """``family`` around a ``module_class`` with the checkpoint's weights and its translated configuration.

    ``module_class`` says how the weights are named (``register_checkpoint_conversion_mapping``); ``complete`` is that of
    :meth:`Checkpoint.load_module`. Raises ModelLoadError, also for what would be computed wrongly.
    """
    config_class = getattr(transformers, translation.architecture).config_class
    try:
        config = config_class.from_dict(dict(translation.config))
    except Exception as error:  # of each field's type, Transformers' validators say what they like
        reason = " ".join(str(error).split())[:400]
        raise ModelLoadError(
            f"config.json of {checkpoint.model!r} is not understood: {reason}", param="model"
        ) from error
    module = checkpoint.load_module(
        module_class,
        config=config,
        attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
        complete=complete,
    )
    attention, info = paged_text(module.config.text_config, checkpoint)
    return family(module, attention, info)
