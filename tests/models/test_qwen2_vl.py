"""The vision towers of Qwen2-VL and Qwen2.5-VL on packed items of many sizes, and what of these checkpoints is loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from filmstrip.config import EngineConfig
from filmstrip.models import qwen_vl
from filmstrip.models.base import EncoderInput
from filmstrip.models.loader import load_model
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.types import Modality, Normalization
from tests.models.batches import pack, text_request
from tests.models.qwen2_vl import PREPROCESSOR, make_qwen2_5_vl, make_qwen2_vl

NORMALIZATION = Normalization(tuple(PREPROCESSOR["image_mean"]), tuple(PREPROCESSOR["image_std"]))
GRIDS = [(1, 2, 2), (1, 8, 8), (3, 10, 6), (1, 2, 34), (2, 16, 24), (1, 18, 2), (4, 4, 4), (1, 22, 14)]
"""Smaller than a window of 8 x 8 patches, as large, whole numbers of windows, and windows cut off on either side."""


def load(path, dtype="float32") -> Any:
    return load_model(EngineConfig(path, device="cpu", dtype=dtype, num_threads=2, block_size=8))


def reference_of(path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[make_qwen2_vl, make_qwen2_5_vl], ids=["qwen2_vl", "qwen2_5_vl"])
def models(request, tmp_path_factory):
    """(ours, Transformers') of the same checkpoint."""
    path = request.param(tmp_path_factory.mktemp("checkpoint"))
    return load(path), reference_of(path)


def items() -> list[EncoderInput]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for grid in GRIDS:
        patches = torch.randint(0, 256, (grid[0] * grid[1] * grid[2], 3 * 2 * 14 * 14), generator=generator)
        modality = Modality.IMAGE if grid[0] == 1 else Modality.VIDEO
        made.append(EncoderInput(modality, patches.to(torch.uint8), grid, NORMALIZATION, grid[0]))
    return made


@torch.inference_mode()
def expected_of(reference, item: EncoderInput) -> torch.Tensor:
    """The reference's embeddings of one item that it sees alone, (num_tokens, hidden_size)."""
    grid = torch.tensor([item.grid_thw])
    return reference.model.visual(normalize_patches(item.patches, item.normalization), grid_thw=grid).pooler_output


@pytest.mark.parametrize("max_patches", [1, 100, 8192])
def test_items_of_many_sizes_packed_equal_each_alone(models, monkeypatch, max_patches):
    """However they are packed: segment by segment, a few at a time, all at once."""
    model, reference = models
    monkeypatch.setattr(qwen_vl, "MAX_PATCHES_PER_FORWARD", max_patches)
    for item, segments in zip(items(), model.encode(items()), strict=True):
        grid_t, grid_h, grid_w = item.grid_thw
        assert [segment.shape for segment in segments] == [(grid_h * grid_w // 4, 1, 64)] * grid_t
        torch.testing.assert_close(torch.cat(segments)[:, 0], expected_of(reference, item), atol=2e-5, rtol=0)


def test_windows_matter(tmp_path):
    """Without them the embeddings of a large picture are others: the test above would tell."""
    reference = reference_of(make_qwen2_5_vl(tmp_path))
    in_windows = expected_of(reference, items()[4])
    reference.model.visual.fullatt_block_indexes = list(range(reference.config.vision_config.depth))
    assert (in_windows - expected_of(reference, items()[4])).abs().max() > 0.01


def test_tied_word_embeddings(tmp_path):
    """As the small published checkpoints have them, whose files have no output head."""
    path = make_qwen2_5_vl(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model, reference = load(path), reference_of(path)
    model.allocate_kv_cache(8)
    ids = list(range(40, 60))
    logits = model.forward(pack([(text_request(ids, list(range(8))), 0, 20)], 8, all_logits=True))
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_sliding_windows_over_text(tmp_path):
    """In the layers that have one; the engine may compute a prompt in parts."""
    path = make_qwen2_vl(tmp_path / "sliding")
    file = tmp_path / "sliding" / "config.json"
    fields = json.loads(file.read_text())
    fields["text_config"] |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    fields["text_config"].pop("layer_types", None)
    file.write_text(json.dumps(fields))
    model, reference = load(path), reference_of(path)
    assert set(reference.config.text_config.layer_types) == {"full_attention", "sliding_attention"}
    model.allocate_kv_cache(16)
    ids = list(range(40, 140))
    request = text_request(ids, list(range(16)))
    logits = [
        model.forward(pack([(request, start, end)], 8, all_logits=True))
        for start, end in ((0, 45), (45, 90), (90, 100))
    ]
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=0)


def test_bfloat16_is_near(models, tmp_path):
    model, reference = models
    make = make_qwen2_vl if reference.config.model_type == "qwen2_vl" else make_qwen2_5_vl
    rounded = load(make(tmp_path / "checkpoint"), "bfloat16")
    for exact, near in zip(model.encode(items()[:3]), rounded.encode(items()[:3]), strict=True):
        wanted, got = torch.cat(exact), torch.cat(near)
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
