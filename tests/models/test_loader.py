"""Finding, checking and loading checkpoints: what works and what each refusal says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from filmstrip.config import EngineConfig
from filmstrip.demo.checkpoint import make_qwen3_vl
from filmstrip.errors import ModelLoadError
from filmstrip.models import devices
from filmstrip.models.checkpoint import open_checkpoint
from filmstrip.models.cpu_features import cpu_has_bfloat16_units
from filmstrip.models.devices import forbid_tf32, resolve_device, resolve_dtype
from filmstrip.models.loader import load_model
from filmstrip.models.registry import find_architecture, model_class, supported_architectures

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def copy(qwen3_vl_dir, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(qwen3_vl_dir, tmp_path / "copy"))


def load(path, **options):
    """Load on CPU with two threads."""
    return load_model(EngineConfig(model=str(path), device="cpu", num_threads=2, **options))


def edit_config(path: Path, **fields) -> None:
    """Change top-level fields of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_loads_in_the_wanted_dtype_with_the_wanted_threads(qwen3_vl_dir):
    model = load(qwen3_vl_dir, dtype="bfloat16")
    assert model.info.dtype == torch.bfloat16
    assert model.info.device == CPU
    assert torch.get_num_threads() == 2
    assert load(qwen3_vl_dir).info.dtype == torch.float32


def test_tied_embeddings_are_not_missing(tmp_path):
    path = make_qwen3_vl(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    load(path)


def test_missing_weights_are_an_error(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.up_proj.weight"], weights["model.visual.merger.norm.bias"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"incomplete: 2 weights .*layers\.1\.mlp\.up_proj"):
        load(copy)


def test_weights_of_a_wrong_shape_are_an_error(copy):
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:10].clone()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="cannot load the weights"):
        load(copy)


def test_unknown_weights_are_named_in_the_log(copy, caplog):
    weights = load_file(copy / "model.safetensors")
    weights["model.extra.weight"] = torch.zeros(2)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    load(copy)
    assert "1 weights are not used, among them model.extra.weight" in caplog.text


def test_a_truncated_file_is_an_error(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="cannot load the weights"):
        load(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "does not exist"),
        (lambda path: (path / "config.json").unlink(), r"no config\.json"),
        (lambda path: (path / "config.json").write_text("{"), r"cannot read config\.json"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), r"only pytorch_model\.bin"),
        (lambda path: edit_config(path, architectures=[]), "names no architecture"),
        (
            lambda path: edit_config(path, architectures=["GPT2LMHeadModel"]),
            "GPT2LMHeadModel, which is not supported",
        ),
        (
            lambda path: edit_config(path, architectures=["MultiModalityCausalLM"]),
            "MultiModalityCausalLM, the format of a first release, .* as in deepseek-community/deepseek-vl-1.3b-chat",
        ),
        (lambda path: edit_config(path, dtype="int8"), "dtype 'int8'"),
        (lambda path: edit_config(path, quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    ],
)
def test_checkpoints_that_cannot_be_served(copy, damage, message):
    damage(copy)
    with pytest.raises(ModelLoadError, match=message) as raised:
        load(copy)
    assert raised.value.http_status == 500


def test_a_file_is_not_a_model_directory(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ModelLoadError, match="is not a directory"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "auto, cpu, cuda or cuda:N, not 'tpu'"),
        ({"device": "mps"}, "auto, cpu, cuda or cuda:N, not 'mps'"),
        ({"device": "cuda:99"}, "'cuda:99' is not here"),
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16, float16, not 'int8'"),
        ({"device": "cpu", "dtype": "float16"}, "float16 is served on CUDA only"),
        ({"num_threads": 0}, "num_threads must be at least 1, not 0"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
    ],
)
def test_options_that_cannot_be_served(qwen3_vl_dir, options, message):
    with pytest.raises(ModelLoadError, match=message) as raised:
        load_model(EngineConfig(**{"model": qwen3_vl_dir, "num_threads": 2} | options))
    assert raised.value.param in options


def test_auto_dtype(monkeypatch):
    """The checkpoint's own on CUDA; on a CPU bfloat16 only for bfloat16 weights and only with the hardware for it."""
    assert resolve_dtype("auto", torch.bfloat16, CUDA) == torch.bfloat16
    assert resolve_dtype("auto", torch.float16, CUDA) == torch.float16
    for has_units, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "cpu_has_bfloat16_units", lambda has_units=has_units: has_units)
        assert resolve_dtype("auto", torch.bfloat16, CPU) == expected
        assert resolve_dtype("auto", torch.float16, CPU) == torch.float32
        assert resolve_dtype("auto", torch.float32, CPU) == torch.float32


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd bf16 sve\n", True),
        ("Features\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_bfloat16_units_are_read_from_cpuinfo(tmp_path, cpuinfo, expected):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_has_bfloat16_units(tmp_path / "cpuinfo") is expected
    assert cpu_has_bfloat16_units(tmp_path / "none") is False


def test_auto_device_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU


def test_dtype_may_stand_with_the_text_model(copy):
    fields = json.loads((copy / "config.json").read_text())
    fields.pop("dtype")
    fields["text_config"]["dtype"] = "float32"
    (copy / "config.json").write_text(json.dumps(fields))
    assert open_checkpoint(EngineConfig(model=str(copy), device="cpu")).dtype == torch.float32


def test_registry():
    assert {"Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration"} <= set(supported_architectures())
    assert find_architecture(["Other", "Qwen3VLForConditionalGeneration"], "m") == "Qwen3VLForConditionalGeneration"
    for name in supported_architectures():
        assert callable(model_class(name).load)
    with pytest.raises(ModelLoadError, match=r"did you mean .*Qwen3VLForConditionalGeneration") as raised:
        find_architecture(["Qwen3VLTinyForConditionalGeneration"], "some/model")
    assert f"Supported architectures: {', '.join(supported_architectures())}" in raised.value.message


def test_a_broken_torchvision_is_named(qwen3_vl_dir, tmp_path):
    """A torchvision built for another PyTorch breaks the import of every vision model in Transformers."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    metadata = tmp_path / "torchvision-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from filmstrip.config import EngineConfig\n"
        "from filmstrip.errors import ModelLoadError\n"
        "from filmstrip.models.loader import load_model\n"
        "try:\n"
        f"    load_model(EngineConfig(model={qwen3_vl_dir!r}, device='cpu', num_threads=1))\n"
        "except ModelLoadError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "the installed torchvision does not fit PyTorch" in result.stdout, result.stderr


def test_float32_on_a_gpu_is_float32():
    """PyTorch's own default lets convolutions drop 13 of 23 bits."""
    for device, dtype, allowed in (
        (CUDA, torch.float32, False),
        (CUDA, torch.bfloat16, True),
        (CPU, torch.float32, True),
    ):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            forbid_tf32(device, dtype)
            assert torch.backends.cudnn.allow_tf32 is allowed


def test_loading_forbids_tf32(qwen3_vl_dir, monkeypatch):
    asked = []
    monkeypatch.setattr("filmstrip.models.loader.forbid_tf32", lambda *device_and_dtype: asked.append(device_and_dtype))
    load(qwen3_vl_dir, dtype="float32")
    assert asked == [(CPU, torch.float32)]
