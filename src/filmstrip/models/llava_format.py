"""Weights of LLaVA or Yi-VL in their original layout in, the served LLaVA or LLaVA-NeXT out.

Source of the names: ``llava_arch.py``, ``clip_encoder.py`` and ``multimodal_projector/builder.py`` of haotian-liu/LLaVA and
of 01-ai/Yi (VL).
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from filmstrip.errors import ModelLoadError
from filmstrip.formats.llava_original import PROJECTOR_TYPE
from filmstrip.formats.source import Source
from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.translated import load_translated, read_translation
from filmstrip.models.vision_text import LlavaNextModel, VisionTextModel


def build_projector(projector_type: str, num_features: int, hidden_size: int) -> nn.Module:
    """From features of the vision tower (..., num_features) to rows of the text model (..., hidden_size).

    ``projector_type`` is ``linear``, ``mlpNx_gelu`` or ``mlpNx_gelu_Norm``; parameters are named as in the original.
    """
    match = PROJECTOR_TYPE.fullmatch(projector_type)
    if match is None:
        raise ValueError(f"there is no projector {projector_type!r}")
    if match["depth"] is None:
        return nn.Linear(num_features, hidden_size)
    layers: list[nn.Module] = []
    for number in range(int(match["depth"])):
        layers += [nn.GELU()] if number else []
        layers.append(nn.Linear(hidden_size if number else num_features, hidden_size))
        layers += [nn.LayerNorm(hidden_size)] if match["norms"] else []
    return nn.Sequential(*layers)


def _projector(config: Any) -> nn.Module:
    return build_projector(config.mm_projector_type, config.vision_config.hidden_size, config.text_config.hidden_size)


class LlavaOriginalForConditionalGeneration(LlavaForConditionalGeneration):
    """Transformers' LLaVA with the original's projector, loaded from the original's names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        parts: Any = self.model
        parts.multi_modal_projector = _projector(config)


class LlavaOriginalNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """Transformers' LLaVA-NeXT with the original's projector, loaded from the original's names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        parts: Any = self.model
        parts.multi_modal_projector = _projector(config)


_CLASSES = {
    "LlavaForConditionalGeneration": (LlavaOriginalForConditionalGeneration, VisionTextModel),
    "LlavaNextForConditionalGeneration": (LlavaOriginalNextForConditionalGeneration, LlavaNextModel),
}
"""Architecture of Transformers that a checkpoint is translated to -> its module's class, and what serves it."""


class LlavaOriginalModel:
    """A LLaVA or Yi-VL checkpoint in its original layout; served as LLaVA-NeXT if it shows pictures in tiles."""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> VisionTextModel:
        """Load the weights of ``checkpoint`` and, if it has none of the vision tower, those of the tower's own checkpoint.

        Raises ModelLoadError, also for what would be computed wrongly.
        """
        translation = read_translation(checkpoint)
        tower = translation.vision_tower
        if tower is None:
            raise ValueError("the translation names no vision tower")
        module_class, family = _CLASSES[translation.architecture]
        return load_translated(
            checkpoint,
            translation,
            module_class,
            family,
            lambda module, missing: _load_tower(module, missing, tower, checkpoint),
        )


_TOWER_PREFIX = "model.vision_tower."


def _load_tower(module: Any, missing: list[str], source: Source, checkpoint: Checkpoint) -> list[str]:
    """Give ``module`` the tower at ``source`` if all of its weights are ``missing``; returns what still is."""
    tower, tower_class = module.model.vision_tower, cast("Any", CLIPVisionModel)
    names = {_TOWER_PREFIX + name for name, _ in tower.named_parameters()}
    if not names.issubset(missing):
        return missing
    try:
        loaded, info = tower_class.from_pretrained(
            source.model,
            revision=source.revision or "main",
            subfolder=source.subfolder,
            config=tower.config,
            dtype=checkpoint.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelLoadError(
            f"{checkpoint.model!r} has no weights of its vision tower, and those of {source} (mm_vision_tower in "
            f"config.json) cannot be loaded: {' '.join(str(error).split())[:400]}",
            param="model",
        ) from error
    if info["missing_keys"]:
        raise ModelLoadError(
            f"the vision tower {source} is incomplete: {len(info['missing_keys'])} weights are missing, among them "
            + ", ".join(sorted(info["missing_keys"])[:3]),
            param="model",
        )
    tower.load_state_dict(loaded.state_dict())
    return [name for name in missing if name not in names]


for _module_class in (LlavaOriginalForConditionalGeneration, LlavaOriginalNextForConditionalGeneration):
    register_checkpoint_conversion_mapping(
        _module_class.__name__,
        [
            WeightRenaming(r"^model\.(layers\.|embed_tokens\.|norm\.)", r"model.language_model.\1"),
            WeightRenaming(r"^model\.mm_projector\.", "model.multi_modal_projector."),
            WeightRenaming(r"^model\.vision_tower\.vision_tower\.", _TOWER_PREFIX),
        ],
        overwrite=True,
    )
