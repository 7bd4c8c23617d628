"""Weights of InternVL under other names in, the served InternVL out: InternVL's original layout and Intern-S1.

Source of the names: ``modeling_intern_vit.py`` and ``modeling_internvl_chat.py`` of OpenGVLab/InternVL,
``modeling_interns1.py`` of InternLM/Intern-S1, and Transformers' conversion script.
"""

from __future__ import annotations

from transformers import InternVLForConditionalGeneration
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from filmstrip.models.checkpoint import Checkpoint
from filmstrip.models.translated import load_translated, read_translation
from filmstrip.models.vision_text import VisionTextModel


class InternVLChatForConditionalGeneration(InternVLForConditionalGeneration):
    """Transformers' InternVL, loaded from the original's names."""


class InternS1ForConditionalGeneration(InternVLForConditionalGeneration):
    """Transformers' InternVL, loaded from Intern-S1's names."""


class InternVLChatModel:
    """An InternVL checkpoint (2, 2.5, 3) in its original layout."""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> VisionTextModel:
        """Load the weights of ``checkpoint``; raises ModelLoadError, also for what would be computed wrongly."""
        translation = read_translation(checkpoint)
        return load_translated(checkpoint, translation, InternVLChatForConditionalGeneration, VisionTextModel)


class InternS1Model:
    """An Intern-S1 checkpoint."""

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> VisionTextModel:
        """Load the weights of ``checkpoint``; raises ModelLoadError, also for what would be computed wrongly."""
        translation = read_translation(checkpoint)
        return load_translated(checkpoint, translation, InternS1ForConditionalGeneration, VisionTextModel)


_TOWER = "model.vision_tower"
_PARTS = (
    WeightRenaming(r"^language_model\.lm_head\.", "lm_head."),
    WeightRenaming(r"^language_model\.model\.", "model.language_model."),
)

register_checkpoint_conversion_mapping(
    InternVLChatForConditionalGeneration.__name__,
    [
        *_PARTS,
        WeightRenaming(r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
        WeightRenaming(r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
        WeightRenaming(r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
        WeightRenaming(r"^vision_model\.embeddings\.class_embedding", f"{_TOWER}.embeddings.cls_token"),
        WeightRenaming(r"^vision_model\.embeddings\.position_embedding", f"{_TOWER}.embeddings.position_embeddings"),
        WeightRenaming(
            r"^vision_model\.embeddings\.patch_embedding\.", f"{_TOWER}.embeddings.patch_embeddings.projection."
        ),
        WeightRenaming(r"^vision_model\.encoder\.layers\.", f"{_TOWER}.encoder.layer."),
        WeightRenaming(r"\.attn\.proj\.", ".attention.projection_layer."),
        WeightRenaming(r"\.attn\.", ".attention."),
        WeightRenaming(r"\.norm1\.", ".layernorm_before."),
        WeightRenaming(r"\.norm2\.", ".layernorm_after."),
        WeightRenaming(r"\.ls([12])$", r".lambda_\1"),
        *(
            WeightConverter(
                f"attention.qkv.{kind}",
                [f"attention.{name}_proj.{kind}" for name in ("q", "k", "v")],
                [Chunk(dim=0)],
            )
            for kind in ("weight", "bias")
        ),
    ],
    overwrite=True,
)

register_checkpoint_conversion_mapping(
    InternS1ForConditionalGeneration.__name__,
    [
        *_PARTS,
        WeightRenaming(r"^(vision_tower\.|multi_modal_projector\.)", r"model.\1"),
        # As the model was first proposed to Transformers.
        WeightRenaming(r"vision_tower\.encoder\.layers\.", "vision_tower.encoder.layer."),
    ],
    overwrite=True,
)
