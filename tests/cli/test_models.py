"""``filmstrip models`` lists what can be loaded, with the media that it takes."""

import json

from filmstrip.cli.main import main
from filmstrip.models.registry import supported_architectures


def test_every_model_is_listed_with_its_media(capsys):
    assert main(["models", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert list(models) == supported_architectures()
    assert models["Qwen3VLForConditionalGeneration"] == ["text", "image", "video"]
    assert models["Qwen3ForCausalLM"] == ["text"]


def test_as_text(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(supported_architectures())
    assert any(line.split() == ["Qwen3_5ForConditionalGeneration", "text,", "image,", "video"] for line in lines)
