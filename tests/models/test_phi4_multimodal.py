"""What of Phi-4-multimodal checkpoints and their adapters is refused, and what LoRA layers change."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from filmstrip.config import EngineConfig
from filmstrip.errors import ModelLoadError
from filmstrip.formats.registry import check_format
from filmstrip.models.loader import load_model
from filmstrip.models.lora import AdaptedLinear, Adapter
from tests.models.phi4_multimodal import add_adapter, make_phi4_multimodal


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    make_phi4_multimodal(path)
    return path


@pytest.fixture
def copy(plain, tmp_path):
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(path) -> Any:
    return load_model(EngineConfig(str(path), device="cpu", dtype="float32", num_threads=1))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("Phi3VForCausalLM", r"Phi-3-vision\), which is not supported: .* never run.* Phi4MultimodalForCausalLM"),
        ("Phi4MMForCausalLM", "format of a first release.* that name Phi4MultimodalForCausalLM"),
    ],
)
def test_what_needs_code_of_the_checkpoint_is_refused(architecture, message):
    with pytest.raises(ModelLoadError, match=rf"'some/model' has the architecture {architecture}.*{message}"):
        check_format({"architectures": [architecture]}, "some/model")


def test_without_an_adapter_pictures_are_answered_and_the_log_says_so(plain, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(plain)
    assert not model.info.has_media_adapter
    assert any("has no folder vision-lora" in record.message for record in caplog.records)


def test_a_window_longer_than_the_context_is_none(plain):
    config = load(plain).module.config
    assert config.sliding_window is None
    assert json.loads((Path(plain) / "config.json").read_text())["sliding_window"] is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "not that of a LoRA adapter"),
        ({"r": 0}, "sets r to 0"),
        ({"r": 8}, r"factors of \(4, \d+\) and \(\d+, 4\) for .*at rank 8"),
        ({"use_dora": True}, "sets use_dora to True"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"alpha_pattern": {"o_proj": 3}}, "sets alpha_pattern"),
        ({"bias": "all"}, "bias to 'all'"),
    ],
)
def test_adapters_that_would_be_computed_wrongly(copy, settings, message):
    add_adapter(copy, **settings)
    with pytest.raises(ModelLoadError, match=message) as raised:
        load(copy)
    assert raised.value.param == "model"


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: name.replace("model.layers.0", "model.layers.9"),
            r"changes model\.layers\.9.*only linear layers in",
        ),
        (
            lambda name: name.replace("model.layers.0", "model.embed_tokens_extend.image_embed"),
            "only linear layers in model.layers",
        ),
        (lambda name: name.replace("lora_A", "lora_magnitude_vector"), "has the weight .*lora_magnitude_vector"),
        (lambda name: None if "layers.1.mlp.down_proj.lora_A" in name else name, "only one factor for .*down_proj"),
        (lambda name: None, "no weights"),
    ],
)
def test_weights_of_adapters_that_have_no_place(copy, rename, message):
    add_adapter(copy)
    file = copy / "vision-lora" / "adapter_model.safetensors"
    renamed = {rename(name): weight for name, weight in load_file(file).items()}
    save_file({name: weight for name, weight in renamed.items() if name}, file)
    with pytest.raises(ModelLoadError, match=message):
        load(copy)


def test_pickled_adapters_are_refused(copy):
    add_adapter(copy)
    (copy / "vision-lora" / "adapter_model.safetensors").rename(copy / "vision-lora" / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"has no adapter_model\.safetensors"):
        load(copy)


@pytest.mark.parametrize(
    "rename", [lambda n: n.removeprefix("base_model.model."), lambda n: n.replace("A.", "A.vision.")]
)
@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_names_and_scaling(copy, rename, rslora, scaling):
    add_adapter(copy, use_rslora=rslora)
    file = copy / "vision-lora" / "adapter_model.safetensors"
    save_file({rename(name): weight for name, weight in load_file(file).items()}, file)
    layer = load(copy).module.model.layers[1].self_attn.qkv_proj
    assert isinstance(layer, AdaptedLinear)
    assert layer._scaling == scaling


@torch.inference_mode()
def test_only_named_rows_change():
    torch.manual_seed(0)
    base, adapter = torch.nn.Linear(5, 7, bias=False), Adapter()
    lora_a, lora_b = torch.randn(2, 5), torch.randn(7, 2)
    layer = AdaptedLinear(base, lora_a, lora_b, 1.5, adapter)
    x = torch.randn(1, 4, 5)
    assert torch.equal(layer(x), base(x))
    adapter.begin(torch.tensor([False, True, False, True]))
    out = layer(x)
    assert torch.equal(out[0, ::2], base(x)[0, ::2])
    merged = base.weight + 1.5 * lora_b @ lora_a
    torch.testing.assert_close(out[0, 1::2], x[0, 1::2] @ merged.T)
    adapter.begin(None)
    assert torch.equal(layer(x), base(x))
