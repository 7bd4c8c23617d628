"""MiniCPM-V's tiles: encoded in as many passes as bounds ask for, each in memory of its own, windows only where they fit."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from filmstrip.config import EngineConfig
from filmstrip.models import minicpm_v
from filmstrip.models.base import EncoderInput
from filmstrip.models.loader import load_model
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.types import Modality, Normalization
from tests.models.minicpm_v import PATCH_SIZE, make_minicpm_v

GRIDS = ((4, 8), (8, 8), (12, 4), (4, 4))
NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))


@pytest.fixture(scope="module", params=["4x", "16x"])
def models(request, tmp_path_factory):
    """(ours, Transformers') of the same checkpoint."""
    path = make_minicpm_v(tmp_path_factory.mktemp("minicpm_v"), downsample_mode=request.param)
    ours = load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2))
    return ours, AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def item():
    num_rows = sum(height * width for height, width in GRIDS)
    patches = torch.randint(0, 256, (num_rows, 3 * PATCH_SIZE**2), generator=torch.Generator().manual_seed(0))
    grid = (1, num_rows, 1)
    return EncoderInput(Modality.IMAGE, patches.to(torch.uint8), grid, NORMALIZATION, len(GRIDS), segment_grids=GRIDS)


@torch.inference_mode()
def expected(reference, item):
    pixels = normalize_patches(item.patches, item.normalization).view(-1, 3, PATCH_SIZE, PATCH_SIZE)
    packed = pixels.permute(1, 2, 0, 3).reshape(1, 3, PATCH_SIZE, -1)
    return reference.get_image_features(packed, torch.tensor(GRIDS, dtype=torch.int32)).pooler_output


@pytest.mark.parametrize("max_patches", [1, 100, 112, 10_000])
def test_tiles_are_encoded_as_transformers_encodes_them(models, item, monkeypatch, max_patches):
    monkeypatch.setattr(minicpm_v, "MAX_PATCHES_PER_FORWARD", max_patches)
    ours, reference = models
    (tiles,) = ours.encode([item])
    theirs = expected(reference, item)
    assert [tile.shape for tile in tiles] == [(len(rows), 1, 64) for rows in theirs]
    for tile, rows in zip(tiles, theirs, strict=True):
        torch.testing.assert_close(tile[:, 0], rows, atol=1e-5, rtol=0)
        assert tile.untyped_storage().nbytes() == tile.numel() * 4


def test_windows_must_be_full(models):
    attention = models[0].module.model.vision_tower.vit_merger.self_attn
    with pytest.raises(ValueError, match="15 patches are not 4 windows of 4"):
        attention(torch.zeros(1, 15, 48), cu_seqlens=torch.tensor([0, 4, 8, 12, 15]), max_seqlen=4)
