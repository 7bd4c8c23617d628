"""A format and a folder in, two checkpoints with the same random weights out: its original layout, and Transformers'.

The originals are written from what their authors published: names of weights, fields of config.json, files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from filmstrip.formats.conversations import VICUNA_V1, YI_VL
from tests.models import tiles

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""A template that takes messages as one string, as those of the original checkpoints do."""
_PARTS = (
    "{%- macro whole(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
    "{{- part.text if part.type == 'text' else marks[part.type] -}}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
PROJECTOR_FILE = "projector.safetensors"
"""In a twin's folder: weights of a projector that Transformers does not have, ``0.weight`` and so on."""


def with_parts(template: str, marks: Mapping[str, str]) -> str:
    """The same template for messages as lists of parts; ``marks`` stand for pictures and videos."""
    template = template.replace("message.content", "whole(message.content)")
    template = template.replace("messages[0].content", "whole(messages[0].content)")
    # A macro sees what is set at the top.
    return "{%- set marks = " + json.dumps(dict(marks)) + " -%}" + _PARTS + template


def _write(path: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], files: Mapping[str, Any]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, values in {**files, "config.json": config}.items():
        (path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    weights = {name: weight.contiguous().clone() for name, weight in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


# InternVL, original layout ------------------------------------------------------------------------------------------

INTERNVL_TEXTS: dict[str, dict[str, Any]] = {
    # The type of the published InternVL3: no change within the context.
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 32},
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
}
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
_INTERNVL_MARKS = {"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _internvl_twin(path: Path, text: str, seed: int, *, qkv_bias: bool, num_frames: int | None) -> str:
    tokenizer = tiles.tokenizer_with(_INTERNVL_TOKENS | {"video_token": "<video>"}, image="", video="")
    tokenizer.chat_template = with_parts(CHATML, _INTERNVL_MARKS)
    size = {"height": 56, "width": 56}
    fields = {
        "vision_config": {
            **tiles.VISION,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "use_qk_norm": not qkv_bias,
            "attention_bias": qkv_bias,
            "norm_type": "layer_norm" if qkv_bias else "rms_norm",
        },
        "text_config": INTERNVL_TEXTS[text],
        "image_token_id": tokenizer.get_vocab()["<IMG_CONTEXT>"],
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": size,
            "max_patches": 6,
            "min_patches": 1,
            **_IMAGENET,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "InternVLVideoProcessor",
            "size": size,
            "do_sample_frames": True,
            "num_frames": num_frames,
            **_IMAGENET,
        },
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    }
    return tiles.save(path, tokenizer, "InternVLForConditionalGeneration", fields, files, seed)


_CHAT_VISION_NAMES = {
    "vision_tower.": "vision_model.",
    ".embeddings.cls_token": ".embeddings.class_embedding",
    ".embeddings.position_embeddings": ".embeddings.position_embedding",
    ".embeddings.patch_embeddings.projection.": ".embeddings.patch_embedding.",
    ".encoder.layer.": ".encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.": ".attn.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_": ".ls",
}
_CHAT_PROJECTOR_NAMES = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}


def _internvl_chat_weights(twin: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    apart: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in load_file(twin / "model.safetensors").items():
        if name.startswith("language_model."):
            weights[name] = weight
            continue
        if name.startswith("multi_modal_projector."):
            _, part, kind = name.split(".")
            weights[f"{_CHAT_PROJECTOR_NAMES[part]}.{kind}"] = weight
            continue
        for new, old in _CHAT_VISION_NAMES.items():
            name = name.replace(new, old)
        before, _, after = name.partition(".attn.")
        if after[1:].startswith("_proj."):
            apart.setdefault(f"{before}.attn.qkv.{after[7:]}", {})[after[0]] = weight
        else:
            weights[name] = weight
    return weights | {name: torch.cat([parts[key] for key in "qkv"]) for name, parts in apart.items()}


def make_internvl_chat(path: Path, text: str, *, seed: int = 0, qkv_bias: bool = True) -> tuple[str, str]:
    """``InternVLChatModel`` with a text model of the architecture ``text``, and its twin.

    With ``qkv_bias`` the tower is like that of 300M parameters, without like that of 6B.
    """
    twin = Path(_internvl_twin(path / "twin", text, seed, qkv_bias=qkv_bias, num_frames=None))
    saved = json.loads((twin / "config.json").read_text())
    vision = saved["vision_config"]
    llm = {name: value for name, value in saved["text_config"].items() if name != "rope_parameters"}
    rope = saved["text_config"]["rope_parameters"]
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    config = {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "llm_config": {
            **llm,
            "_name_or_path": "somewhere",
            "_attn_implementation_autoset": True,
            "architectures": [text],
            "attn_implementation": "flash_attention_2",
            "rope_theta": rope["rope_theta"],
            "rope_scaling": scaling,
            "torch_dtype": "float32",
            "use_bfloat16": True,
        },
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision["hidden_size"],
            "image_size": 56,
            "initializer_factor": 1.0,
            "intermediate_size": vision["intermediate_size"],
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": vision["norm_type"],
            "num_attention_heads": vision["num_attention_heads"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "patch_size": 14,
            "qk_normalization": not qkv_bias,
            "qkv_bias": qkv_bias,
            "use_flash_attn": True,
        },
    }
    # What the published repositories have as such files: settings that no program reads.
    files = {
        "preprocessor_config.json": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 448, "crop_size": 448}
    }
    original = _write(path / "original", config, _internvl_chat_weights(twin), files)
    tokenizer = tiles.tokenizer_with(_INTERNVL_TOKENS, image="")
    tokenizer.chat_template = CHATML
    _save_tokenizer(tokenizer, twin, original)
    return original, str(twin)


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, twin: Path, original: str) -> None:
    tokenizer.save_pretrained(original)
    shutil.copy(twin / "generation_config.json", original)


# Intern-S1 ----------------------------------------------------------------------------------------------------------


def make_interns1(path: Path, text: str, *, seed: int = 0, layers: str = "layer") -> tuple[str, str]:
    """``InternS1ForConditionalGeneration`` with a text model of the architecture ``text``, and its twin.

    ``layers`` is what the tower's list of layers is called: it differs between the published model and its first proposal
    to Transformers.
    """
    twin = Path(_internvl_twin(path / "twin", text, seed, qkv_bias=True, num_frames=5))
    weights = {}
    for name, weight in load_file(twin / "model.safetensors").items():
        name = name.replace("language_model.lm_head.", "lm_head.")
        name = name.replace("language_model.model.", "model.language_model.")
        if name.startswith(("vision_tower.", "multi_modal_projector.")):
            name = "model." + name.replace(".encoder.layer.", f".encoder.{layers}.")
        weights[name] = weight
    saved = json.loads((twin / "config.json").read_text())
    config = saved | {
        "architectures": ["InternS1ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_interns1.InternS1Config",
            "AutoModelForCausalLM": "modeling_interns1.InternS1ForConditionalGeneration",
        },
        "model_type": "interns1",
        "text_config": saved["text_config"] | {"architectures": [text], "router_aux_loss_coef": 0.001},
        "vision_config": saved["vision_config"]
        | {"architectures": ["InternS1VisionModel"], "model_type": "interns1_vision", "drop_path_rate": 0.0},
    }
    original = _write(path / "original", config, weights, {})
    for file in twin.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, original)
    return original, str(twin)


# LLaVA and Yi-VL, original layout -----------------------------------------------------------------------------------

_CLIP = {**tiles.VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "projection_dim": 32}
_IMAGE_MARK = {"image": "<image>\n"}
_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
"""Widths and heights."""
_CROPPED = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True}
_LLAVA_TEXTS: dict[str, dict[str, Any]] = {
    "LlavaLlamaForCausalLM": {"model_type": "llama"},
    "LlavaMistralForCausalLM": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "LlavaQwenForCausalLM": {"model_type": "qwen2"},
}


def _llava_tokenizer(architecture: str, *, with_image: bool) -> PreTrainedTokenizerFast:
    """The text model's own tokenizer, or with the token for images behind all others, as in Transformers."""
    image = {"image_token": "<image>"} if with_image else {}
    if architecture == "LlavaQwenForCausalLM":
        return tiles.tokenizer_with(image, image="")
    return tiles.llama_tokenizer({"bos_token": "<s>", **image}, image="")


def _projector_weights(projector_type: str, seed: int) -> dict[str, torch.Tensor] | None:
    """Weights of a projector that is not that of Transformers' LLaVA; None for the one that is."""
    features, hidden = tiles.VISION["hidden_size"], tiles.TEXT["hidden_size"]
    if projector_type == "mlp2x_gelu":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # modules draw their weights from the process's generator
        if projector_type == "linear":
            module: nn.Module = nn.Linear(features, hidden)
        else:
            layers = [nn.Linear(features, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)]
            module = nn.Sequential(*layers, nn.LayerNorm(hidden))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight + torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() == 1 else 0.05)
        for name, weight in module.state_dict().items()
    }


def make_llava_original(
    path: Path,
    architecture: str,
    *,
    aspect: str = "pad",
    projector_type: str = "mlp2x_gelu",
    template: str | None = None,
    tower: str = "inside",
    seed: int = 0,
) -> tuple[str, str]:
    """``LlavaLlamaForCausalLM`` or another in the original layout, and its twin.

    ``template`` is the checkpoint's own; without it, it has none. ``tower``: its weights are "inside" the checkpoint's
    files, in a "folder" of it, or in "another" checkpoint. The twin has a file of its own for a projector unlike LLaVA's.
    """
    is_anyres = aspect == "anyres"
    default = YI_VL if projector_type.endswith("_Norm") else VICUNA_V1
    tokenizer = _llava_tokenizer(architecture, with_image=True)
    tokenizer.chat_template = with_parts(template or default, _IMAGE_MARK)
    points = [[height, width] for width, height in _PINPOINTS]
    kind = "LlavaNext" if is_anyres else "Llava"
    fields = {
        "vision_config": _CLIP,
        "text_config": _LLAVA_TEXTS[architecture],
        "image_token_index": tokenizer.get_vocab()["<image>"],
        "vision_feature_layer": -2,
        **({"image_grid_pinpoints": points} if is_anyres else {}),
    }
    files = {
        "preprocessor_config.json": {
            "image_processor_type": f"{kind}ImageProcessor",
            **_CROPPED,
            **({"image_grid_pinpoints": points} if is_anyres else {"do_pad": aspect == "pad"}),
        },
        "processor_config.json": {
            "processor_class": f"{kind}Processor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    }
    twin = Path(tiles.save(path / "twin", tokenizer, f"{kind}ForConditionalGeneration", fields, files, seed))
    projector = _projector_weights(projector_type, seed)
    if projector is not None:
        save_file(projector, twin / PROJECTOR_FILE)

    original = path / "original"
    tower_path = {"folder": original / "vit" / "clip"}.get(tower, path / "tower")
    weights, tower_weights = _llava_weights(twin, projector)
    if tower == "inside":
        weights |= {f"model.vision_tower.vision_tower.{name}": weight for name, weight in tower_weights.items()}
        tower_weights = {}
    # A whole CLIP, as on the hub: its vision part has a field and a prefix of its own.
    vision = {name: value for name, value in _CLIP.items() if name != "model_type"}
    clip = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": vision, "projection_dim": 32}
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56, "resample": 3}
    settings |= {"do_center_crop": True, "do_normalize": True, "do_resize": True, **_CLIP_PIXELS}
    _write(tower_path, clip, {**tower_weights, "logit_scale": torch.zeros(())}, {"preprocessor_config.json": settings})
    text = json.loads((twin / "config.json").read_text())["text_config"]
    config = text | {
        "_name_or_path": "llava",
        "architectures": [architecture],
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": aspect,
        "image_grid_pinpoints": _PINPOINTS if is_anyres else None,
        "mm_hidden_size": _CLIP["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad" if is_anyres else "flat",
        "mm_projector_type": projector_type,
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "./vit/clip" if tower == "folder" else str(tower_path),
        "model_type": "llava_llama",
        "tokenizer_model_max_length": 4096,
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": tower == "inside",
        "use_mm_proj": True,
    }
    _write(original, config, weights, {})
    own = _llava_tokenizer(architecture, with_image=False)
    own.chat_template = template
    _save_tokenizer(own, twin, str(original))
    return str(original), str(twin)


_CLIP_PIXELS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _llava_weights(
    twin: Path, projector: Mapping[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of the checkpoint without its tower, and those of the tower as in its own checkpoint."""
    weights, tower = {}, {}
    for name, weight in load_file(twin / "model.safetensors").items():
        if name.startswith("vision_tower."):
            inner = name.removeprefix("vision_tower.").removeprefix("vision_model.")
            tower[f"vision_model.{inner}"] = weight
        elif name.startswith("multi_modal_projector."):
            if projector is None:
                name = name.replace("linear_1", "0").replace("linear_2", "2")
                weights[name.replace("multi_modal_projector.", "model.mm_projector.")] = weight
        elif name == "image_newline":
            weights["model.image_newline"] = weight
        else:
            weights[name.removeprefix("language_model.")] = weight
    return weights | {f"model.mm_projector.{name}": weight for name, weight in (projector or {}).items()}, tower
