"""config.json of a LLaVA or Yi-VL checkpoint in its original layout in, files as Transformers' LLaVA has them out.

Source: ``llava_arch.py``, ``clip_encoder.py``, ``multimodal_projector/builder.py``, ``mm_utils.py`` and ``conversation.py``
of haotian-liu/LLaVA, and the files of the same names of 01-ai/Yi (VL). The fields of the text model stand at the top of
config.json; the vision tower is another checkpoint, which the field ``mm_vision_tower`` names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filmstrip.errors import ModelLoadError
from filmstrip.formats.base import Translation, refuse_fields, text_fields
from filmstrip.formats.conversations import VICUNA_V1, YI_VL
from filmstrip.formats.source import Source

_TEXT_MODELS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
_TOWERS = ("clip", "clip_vision_model")
PROJECTOR_TYPE = re.compile(r"linear|mlp(?P<depth>[1-9]\d?)x_gelu(?P<norms>_Norm)?")
"""``mm_projector_type``: one linear layer, or so many with GELU between them, each with a LayerNorm behind it in Yi-VL."""


def translate(fields: Mapping[str, Any], source: Source) -> Translation:
    """``fields`` of config.json of the checkpoint at ``source`` translated, with the files of its vision tower.

    ModelLoadError for what Transformers' modules would compute otherwise, or for a tower that cannot be read.
    """
    refuse_fields(
        fields,
        {
            "mm_use_im_start_end": (False, None),
            "mm_resampler_type": (None,),
            "mm_vision_select_feature": ("patch", "cls_patch"),
            "s2": (False, None),
        },
    )
    architecture = (fields.get("architectures") or [""])[0]
    projector_type = str(fields.get("mm_projector_type", "linear"))
    match = PROJECTOR_TYPE.fullmatch(projector_type)
    if match is None:
        raise ModelLoadError(
            f"config.json sets mm_projector_type to {projector_type!r}; only linear, mlpNx_gelu and mlpNx_gelu_Norm are "
            "supported",
            param="model",
        )
    tower = _tower_source(fields, source)
    vision = _vision(tower, fields)
    strategy = "default" if fields.get("mm_vision_select_feature", "patch") == "patch" else "full"
    text = {name: value for name, value in fields.items() if not name.startswith(("mm_", "image_", "tune_", "freeze_"))}
    config = {
        "text_config": text_fields(text, _TEXT_MODELS, architecture),
        "vision_config": vision,
        "vision_feature_layer": fields.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy,
        "mm_projector_type": projector_type,
        "tie_word_embeddings": bool(fields.get("tie_word_embeddings", False)),
    }
    pixels = {name: value for name, value in tower.json("preprocessor_config.json").items() if name in _PIXEL_FIELDS}
    kind, of_kind, of_pixels = _aspect(fields)
    processor = {
        "processor_class": f"{kind}Processor",
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1,
    }
    is_yi = bool(match["norms"])
    default_template = VICUNA_V1 if architecture == "LlavaLlamaForCausalLM" else None
    return Translation(
        files={
            "config.json": config | of_kind,
            "preprocessor_config.json": pixels | of_pixels,
            "processor_config.json": processor,
            # Yi-VL's turns end in no token of their own, but where the next one would begin.
            **({"generation_config.json": source.json("generation_config.json") | _YI_STOP} if is_yi else {}),
        },
        control_tokens=("<image>",),
        media_marks={"image": "<image>\n"},
        chat_template=YI_VL if is_yi else default_template,
        vision_tower=tower,
    )


_YI_STOP = {"stop_strings": ["###"]}
_PIXEL_FIELDS = frozenset(
    {
        *("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"),
        *("do_resize", "do_center_crop", "do_rescale", "do_normalize"),
    }
)


def _aspect(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """How pictures of other shapes are shown: the family, and what follows for config.json and preprocessor_config.json."""
    aspect = fields.get("image_aspect_ratio")
    if aspect == "anyres":
        merge_type = fields.get("mm_patch_merge_type", "flat")
        if merge_type != "spatial_unpad":
            raise ModelLoadError(
                f"config.json sets mm_patch_merge_type to {merge_type!r}; with image_aspect_ratio 'anyres' only "
                "'spatial_unpad' is supported",
                param="model",
            )
        # The original's are (width, height), Transformers' (height, width); of sizes that suit alike the first is taken.
        points = [[height, width] for width, height in _pinpoints(fields.get("image_grid_pinpoints"))]
        config = {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_grid_pinpoints": points,
        }
        pixels = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": points}
        return "LlavaNext", config, pixels
    if aspect not in (None, "square", "pad"):
        hint = ""
        if str(aspect).startswith("anyres_max"):
            hint = "; LLaVA-OneVision is served in Transformers' format (LlavaOnevisionForConditionalGeneration)"
        raise ModelLoadError(
            f"config.json sets image_aspect_ratio to {aspect!r}; only 'square', 'pad' and 'anyres' are supported{hint}",
            param="model",
        )
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    return "Llava", config, {"image_processor_type": "LlavaImageProcessor", "do_pad": aspect == "pad"}


def _pinpoints(value: Any) -> list[tuple[int, int]]:
    """Sizes as a list or as the text of one; ModelLoadError for anything else."""
    try:
        points = json.loads(value) if isinstance(value, str) else value
        return [(int(width), int(height)) for width, height in points]
    except (TypeError, ValueError) as error:
        raise ModelLoadError(
            f"config.json sets image_grid_pinpoints to {value!r}, which is no list of (width, height)", param="model"
        ) from error


def _tower_source(fields: Mapping[str, Any], source: Source) -> Source:
    """Where the tower's files are: a folder of the checkpoint, a directory, or a hub id."""
    name = fields.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise ModelLoadError(f"config.json of {source} names no vision tower (field 'mm_vision_tower')", param="model")
    path = Path(name).expanduser()
    if path.is_absolute():
        return Source(str(path))
    is_folder = name.startswith("./") or (Path(source.model) / path / "config.json").is_file()
    return source.inside(name) if is_folder else Source(name)


def _vision(tower: Source, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's configuration; ModelLoadError if it is not to be had, is no CLIP, or does not fit the projector."""
    try:
        found = tower.json("config.json")
    except ModelLoadError as error:
        found, cause = {}, error
    else:
        cause = None
    if not found:
        raise ModelLoadError(
            f"the vision tower {tower} (mm_vision_tower in config.json) has no config.json that can be read; set "
            "mm_vision_tower to a directory with a CLIP checkpoint or to its hub id",
            param="model",
        ) from cause
    if found.get("model_type") not in _TOWERS:
        raise ModelLoadError(
            f"the vision tower {tower} (mm_vision_tower in config.json) is of the type {found.get('model_type')!r}; only "
            "CLIP is supported",
            param="model",
        )
    vision = dict(found["vision_config"]) if found["model_type"] == "clip" else dict(found)
    vision = {"hidden_size": 768, "patch_size": 32, **vision, "model_type": "clip_vision_model"}
    wanted = fields.get("mm_hidden_size", vision["hidden_size"])
    if wanted != vision["hidden_size"]:
        raise ModelLoadError(
            f"config.json sets mm_hidden_size to {wanted}, but the vision tower {tower} has features of "
            f"{vision['hidden_size']}",
            param="model",
        )
    return {name: value for name, value in vision.items() if not name.startswith("_") and name != "architectures"}
