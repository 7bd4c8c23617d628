"""What of Llama 4 is ours: experts, what decides what a token sees, and which checkpoints are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from filmstrip.config import EngineConfig
from filmstrip.demo.checkpoint import randomize_weights
from filmstrip.errors import ModelLoadError
from filmstrip.models.base import EncoderInput
from filmstrip.models.llama4 import SparseMoe
from filmstrip.models.loader import load_model
from filmstrip.types import Modality, Normalization
from tests.models.batches import pack, text_request
from tests.models.llama4 import make_llama4
from tests.models.text import make_text

NUM_TOKENS = 120


def load(path, dtype="float32") -> Any:
    return load_model(EngineConfig(str(path), device="cpu", dtype=dtype, num_threads=2, block_size=8))


def logits_of(model) -> torch.Tensor:
    """Of every token of a prompt, (NUM_TOKENS, vocab_size)."""
    model.allocate_kv_cache(NUM_TOKENS // 8)
    tokens = torch.randint(0, 500, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    request = text_request(tokens, range(NUM_TOKENS // 8))
    return model.forward(pack([(request, 0, NUM_TOKENS)], 8, all_logits=True))


def with_config(path, folder: Path, change) -> Path:
    """The checkpoint again, its config.json changed by ``change``."""
    for file in Path(path).iterdir():
        (folder / file.name).hardlink_to(file)
    fields = json.loads((folder / "config.json").read_text())
    change(fields.get("text_config", fields))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def text_path(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text"), "Llama4ForCausalLM")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama4(tmp_path_factory.mktemp("llama4"))


@pytest.mark.parametrize("num_chosen", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_sparse_experts_equal_dense_ones(num_chosen, num_tokens):
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=5, num_experts_per_tok=num_chosen, num_hidden_layers=1
    )
    dense = Llama4TextMoe(config)
    randomize_weights(dense, num_tokens)
    hidden = torch.randn(1, num_tokens, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, expected_logits = dense(hidden)
        output, logits = SparseMoe(dense)(hidden)
    assert torch.equal(logits, expected_logits)
    assert output.shape == expected.shape
    assert (output - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "value", "first"),
    [
        ("attention_chunk_size", 10**6, 50),  # the first token of the second chunk
        ("attn_temperature_tuning", False, 31),  # position + 1 reaches floor_scale
        ("no_rope_layers", [1, 1, 1, 0], 1),
        ("use_qk_norm", True, 1),
    ],
)
def test_settings_reach_what_a_token_sees(text_path, tmp_path, name, value, first):
    """Logits change from the first token on that a setting is about, and not before."""
    expected = logits_of(load(text_path))
    changed = logits_of(load(with_config(text_path, tmp_path, lambda text: text.update({name: value}))))
    differences = (changed - expected).abs().amax(dim=1)
    assert differences[:first].max() < 1e-4
    assert differences[first] > 1e-2


@pytest.mark.parametrize("make", [make_llama4, lambda path: make_text(path, "Llama4ForCausalLM")])
def test_the_number_that_the_first_files_have_for_true(make, tmp_path):
    """``"attn_temperature_tuning": 4``, which Transformers itself refuses by now."""
    path = make(tmp_path / "model")
    (tmp_path / "old").mkdir()
    old = with_config(path, tmp_path / "old", lambda text: text.update(attn_temperature_tuning=4))
    assert torch.equal(logits_of(load(old)), logits_of(load(path)))


def test_fields_of_the_first_files(path, tmp_path):
    """Rotary settings by their old names, no list of layers, and fields that nothing reads."""

    def older(text):
        assert text.pop("rope_parameters")["rope_theta"] == 500000.0
        del text["no_rope_layers"], text["layer_types"], text["moe_layers"]
        text.update(rope_theta=500000.0, rope_scaling=None, for_llm_compressor=False, no_rope_layers=[])

    expected = logits_of(load(path))
    assert torch.equal(logits_of(load(with_config(path, tmp_path, older))), expected)


def test_chunks_without_a_size_are_not_loaded(text_path, tmp_path):
    broken = with_config(text_path, tmp_path, lambda text: text.update(attention_chunk_size=None))
    with pytest.raises(ModelLoadError, match="sets attention_chunk_size to None"):
        load(broken)


def test_a_config_that_cannot_be_read_is_named(text_path, tmp_path):
    broken = with_config(text_path, tmp_path, lambda text: text.update(num_hidden_layers="many"))
    with pytest.raises(ModelLoadError, match=r"cannot read config\.json.*num_hidden_layers"):
        load(broken)


def test_bfloat16(path):
    """Tiles and text in the dtype of the published weights, near the answer in float32."""
    patches = torch.randint(0, 256, (3, 3 * 56 * 56), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    item = EncoderInput(Modality.IMAGE, patches, (1, 3, 1), Normalization((0.5,) * 3, (0.5,) * 3, "bfloat16"), 3)
    half, full = load(path, "bfloat16"), load(path)
    near, exact = (model.encode([item])[0] for model in (half, full))
    assert [segment.shape for segment in near] == [(4, 1, 64)] * 3
    assert near[0].dtype == torch.bfloat16
    for ours, expected in zip(near, exact, strict=True):
        assert (ours.float() - expected).abs().max() < 0.1 * expected.abs().max()
    agreement = torch.nn.functional.cosine_similarity(logits_of(half), logits_of(full), dim=1)
    assert agreement.median() > 0.99
