"""Formats translated or refused: what each error says, which words a conversation gets, where a vision tower is found."""

import json
from pathlib import Path

import pytest

from filmstrip.config import EngineConfig, LLMConfig
from filmstrip.errors import InvalidRequestError, ModelLoadError
from filmstrip.formats.base import Translation
from filmstrip.formats.registry import refused_architectures, translate, translated_architectures
from filmstrip.formats.source import Source
from filmstrip.models.checkpoint import open_checkpoint
from filmstrip.models.loader import load_model
from filmstrip.models.registry import supported_architectures
from filmstrip.processing.chat_template import ChatTemplate
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.prompt_builder import PromptBuilder
from filmstrip.processing.tokenizer import Tokenizer
from tests.models import formats, tiles

IMAGE = {"type": "image"}


def write_config(path: Path, **fields) -> str:
    (path / "config.json").write_text(json.dumps(fields))
    (path / "model.safetensors").write_bytes(b"")
    return str(path)


def edit_config(path: str, part: str | None = None, **fields) -> str:
    file = Path(path) / "config.json"
    config = json.loads(file.read_text())
    (config if part is None else config[part]).update(fields)
    file.write_text(json.dumps(config))
    return path


def text_of(pieces, tokenizer) -> str:
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    return "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Made once; tests that change it copy its small files."""
    return formats.make_llava_original(tmp_path_factory.mktemp("llava"), "LlavaLlamaForCausalLM", tower="another")[0]


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    return formats.make_internvl_chat(tmp_path_factory.mktemp("internvl"), "Qwen2ForCausalLM")[0]


@pytest.fixture
def small(tmp_path):
    """Copies a checkpoint's small files, and an empty file for its weights."""

    def copy(path: str) -> str:
        for file in Path(path).iterdir():
            if file.suffix in {".json", ".jinja"}:
                (tmp_path / file.name).write_text(file.read_text())
        (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    return copy


@pytest.mark.parametrize(
    ("fields", "what", "nearest"),
    [
        ({"architectures": ["CogVLMForCausalLM"]}, "CogVLM2", "Glm4vForConditionalGeneration"),
        ({"architectures": ["CogVLMVideoForCausalLM"]}, "CogVLM2-Video", "Glm4vForConditionalGeneration"),
        ({"architectures": ["ChatGLMModel"]}, "GLM-4V-9B", "Glm4vForConditionalGeneration"),
        ({"architectures": ["ChatGLMForConditionalGeneration"]}, "GLM-4V-9B", "Glm4vForConditionalGeneration"),
        ({"architectures": ["DeepseekVLV2ForCausalLM"]}, "DeepSeek-VL2", "Qwen3VLMoeForConditionalGeneration"),
        ({"model_type": "deepseek_vl_v2"}, "DeepSeek-VL2", "Qwen3VLMoeForConditionalGeneration"),
        ({"architectures": ["InternLMXComposer2ForCausalLM"]}, "InternLM-XComposer2", "InternVLChatModel"),
        ({"architectures": ["QWenLMHeadModel"]}, "Qwen-VL", "Qwen2VLForConditionalGeneration"),
    ],
)
def test_formats_that_cannot_be_served_say_why_and_what_is_near(tmp_path, fields, what, nearest):
    """Before anything else of the checkpoint is read: it has no tokenizer here."""
    path = write_config(tmp_path, **fields)
    for load in (lambda: open_checkpoint(EngineConfig(path)), lambda: PromptBuilder(LLMConfig(EngineConfig(path)))):
        with pytest.raises(ModelLoadError, match="code that comes with a checkpoint is never run") as refused:
            load()
        assert what in refused.value.message
        assert f"The nearest supported one is {nearest}" in refused.value.message
        assert nearest in supported_architectures()
        assert refused.value.param == "model"


def test_registry():
    assert set(translated_architectures()) < set(supported_architectures())
    assert set(translated_architectures().values()) < set(supported_architectures())
    assert not set(refused_architectures()) & set(supported_architectures())
    assert translate({"architectures": ["Qwen3VLForConditionalGeneration"]}, Source("m")) == Translation()
    assert translate({}, Source("m")) == Translation()


@pytest.mark.parametrize(
    ("part", "fields", "named"),
    [
        (None, {"ps_version": "v1"}, "sets ps_version to 'v1'; only 'v2'"),
        (None, {"select_layer": -4}, "sets select_layer to -4; only -1"),
        (None, {"use_thumbnail": False}, "sets use_thumbnail to False"),
        (None, {"pad2square": True}, "sets pad2square to True"),
        (None, {"force_image_size": 112}, r"force_image_size to 112, but vision_config\.image_size to 56"),
        ("llm_config", {"architectures": ["InternLM2ForCausalLM"]}, "text model of this checkpoint is InternLM2"),
        ("llm_config", {"quantization_config": {"quant_method": "awq"}}, r"text model is quantised \(awq\)"),
        ("vision_config", {"qk_normalization": True, "layer_norm_eps": 1e-5}, "layer_norm_eps to 1e-05"),
    ],
)
def test_what_an_original_internvl_would_compute_otherwise(internvl, small, part, fields, named):
    path = edit_config(small(internvl), part, **fields)
    with pytest.raises(ModelLoadError, match=named):
        load_model(EngineConfig(path, device="cpu", num_threads=1))


def test_an_original_internvl_without_tiles(internvl, small):
    files = CheckpointFiles(edit_config(small(internvl), dynamic_image_size=False, use_thumbnail=False))
    assert files.json("preprocessor_config.json")["max_patches"] == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9'.*LlavaOnevisionForConditionalGeneration"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "mm_patch_merge_type to 'flat'"),
        (
            {
                "image_aspect_ratio": "anyres",
                "mm_patch_merge_type": "spatial_unpad",
                "image_grid_pinpoints": "(1x1),...,(6x6)",
            },
            "image_grid_pinpoints to '\\(1x1\\)",
        ),
        ({"mm_projector_type": "identity"}, "mm_projector_type to 'identity'; only linear, mlpNx_gelu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end to True"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature to 'cls'"),
        ({"mm_hidden_size": 144}, "mm_hidden_size to 144, but the vision tower .* has features of 48"),
        ({"mm_vision_tower": None}, r"names no vision tower \(field 'mm_vision_tower'\)"),
        (
            {"mm_vision_tower": "/nowhere/clip"},
            r"'/nowhere/clip' \(mm_vision_tower in config\.json\) has no config\.json",
        ),
        (
            {"mm_vision_tower": "./vit"},
            r"/vit' \(mm_vision_tower in config\.json\) has no",
        ),
        ({"mm_vision_tower": "./../vit"}, "is not a folder inside"),
    ],
)
def test_what_an_original_llava_would_compute_otherwise(llava, small, fields, named):
    path = edit_config(small(llava), **fields)
    with pytest.raises(ModelLoadError, match=named):
        load_model(EngineConfig(path, device="cpu", num_threads=1))


def test_a_tower_of_another_kind(llava, small, tmp_path_factory):
    tower = tmp_path_factory.mktemp("tower")
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ModelLoadError, match="is of the type 'siglip'; only CLIP is supported"):
        translate(
            json.loads((Path(edit_config(small(llava), mm_vision_tower=str(tower))) / "config.json").read_text()),
            Source(llava),
        )


def test_a_tower_without_safetensors(tmp_path):
    path, _ = formats.make_llava_original(tmp_path, "LlavaLlamaForCausalLM", tower="another")
    (tmp_path / "tower" / "model.safetensors").rename(tmp_path / "tower" / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"has no weights of its vision tower, and those of .*tower' .* cannot be"):
        load_model(EngineConfig(path, device="cpu", num_threads=1))


def test_sizes_of_tiles_may_be_written_as_text(llava, small):
    fields = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    path = edit_config(small(llava), **fields, image_grid_pinpoints="[[56, 112], [112, 112]]")
    files = CheckpointFiles(path)
    assert files.json("config.json")["image_grid_pinpoints"] == [[112, 56], [112, 112]]
    assert files.json("config.json")["architectures"] == ["LlavaNextForConditionalGeneration"]


CONVERSATION = [
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is <image> this?"}]},
    {"role": "assistant", "content": "A <|im_end|> bar."},
    {"role": "user", "content": "Sure?"},
]


def render(path: str, messages) -> tuple[str, int]:
    """The prompt's text, and how many places for pictures it has."""
    files = CheckpointFiles(path)
    tokenizer = Tokenizer(path, control_tokens=files.translation.control_tokens)
    pieces = ChatTemplate(tokenizer, files).render(messages)
    return text_of(pieces, tokenizer).strip(), pieces.count(tokenizer.special_tokens["<image>"])


def test_words_of_llava(llava):
    """``vicuna_v1`` of the original; what a user spells is no control token. A turn ends as this tokenizer's do."""
    text, num_pictures = render(llava, CONVERSATION)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: <image>\nWhat is <image> this? ASSISTANT: A <|im_end|> bar.<|im_end|>"
        "USER: Sure? ASSISTANT:"
    )
    assert num_pictures == 1
    system = {"role": "system", "content": "Be brief."}
    assert render(llava, [system, CONVERSATION[2]])[0] == "Be brief. USER: Sure? ASSISTANT:"
    with pytest.raises(InvalidRequestError, match="the roles system \\(first\\), user and assistant"):
        render(llava, [CONVERSATION[2], system])


def test_words_of_yi_vl(tmp_path):
    """``mm_default`` of the original, with its end of a turn among what stops an answer."""
    path, _ = formats.make_llava_original(tmp_path, "LlavaLlamaForCausalLM", projector_type="mlp2x_gelu_Norm")
    text, num_pictures = render(path, CONVERSATION)
    assert text.startswith("This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI")
    assert text.endswith(
        "和礼貌的回答。\n\n### Human: <image>\nWhat is <image> this?\n### Assistant: A <|im_end|> bar.\n### Human: Sure?\n"
        "### Assistant:"
    )
    assert num_pictures == 1
    generation = CheckpointFiles(path).json("generation_config.json")
    assert generation["stop_strings"] == ["###"]
    assert "eos_token_id" in generation


def test_a_format_without_a_template_of_its_own(tmp_path):
    path, _ = formats.make_llava_original(tmp_path, "LlavaMistralForCausalLM")
    with pytest.raises(
        ModelLoadError, match=r"has no chat template.* --chat-template .* beside it as chat_template\.jinja"
    ):
        render(path, CONVERSATION)
    (Path(path) / "chat_template.jinja").write_text(formats.CHATML)
    assert render(path, CONVERSATION)[0].endswith("<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant")


def test_media_that_a_format_does_not_take(llava):
    with pytest.raises(InvalidRequestError, match="this model takes no video"):
        render(llava, [{"role": "user", "content": [{"type": "video"}]}])


def test_a_tokenizer_that_is_code(tmp_path):
    """Only its tokenizer.json is read, and nothing asks on the terminal."""
    tiles.tokenizer_with({}, image="").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit\n")
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode_text("a b")) == "a b"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"is code that comes with the checkpoint.* put a tokenizer\.json"):
        Tokenizer(str(tmp_path))
