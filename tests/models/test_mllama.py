"""Mllama's own parts: attention to pictures against plain softmax attention, and checkpoints that are refused."""

import json
from pathlib import Path

import pytest
import torch

from filmstrip.config import EngineConfig
from filmstrip.errors import ModelLoadError
from filmstrip.models.batch import AttendedMedia
from filmstrip.models.loader import load_model
from filmstrip.models.mllama import CrossAttentionStep
from tests.models.batches import pack, text_request
from tests.models.mllama import make_mllama

PATCHES = 5


def picture(offset, tiles, seed):
    """K and V of a picture of up to 4 tiles: 2 layers, 2 heads of 8."""
    encoded = torch.randn(2, 2, 2, 4 * PATCHES, 8, generator=torch.Generator().manual_seed(seed))
    return AttendedMedia(offset, encoded, (1, *tiles))


def expected_row(query, pictures, lengths, layer):
    """float64 attention of one row to the first rows of some pictures."""
    parts = [each.encoded[layer, :, :, :length].double() for each, length in zip(pictures, lengths, strict=True)]
    keys, values = torch.cat(parts, dim=2).repeat_interleave(2, dim=1)
    weights = torch.softmax(0.3 * torch.einsum("hd,hkd->hk", query.double(), keys), -1)
    return torch.einsum("hk,hkd->hd", weights, values)


def test_rows_attend_to_what_they_see():
    """A prompt with pictures at 2 and 3, one without, one that decodes behind its second picture."""
    texts = [text_request(range(6), [0, 1]), text_request(range(3), [2]), text_request(range(9), [3, 4, 5])]
    batch = pack([(texts[0], 0, 6), (texts[1], 0, 3), (texts[2], 8, 9)], block_size=4)
    one, two, three = picture(2, (1, 2), 1), picture(3, (2, 2), 2), picture(4, (1, 1), 3)
    batch.attended_media = [[one, two], [], [three]]
    step = CrossAttentionStep(batch, PATCHES, torch.float32)
    assert step.rows is not None
    assert step.rows.tolist() == [0, 1, 2, 3, 4, 5, 9]
    assert step.mlp_mask.shape == (1, 1, 7, 1)
    assert step.mlp_mask.flatten().tolist() == [0, 0, 1, 1, 1, 1, 1]
    query = torch.randn(7, 4, 8, generator=torch.Generator().manual_seed(4))
    full, both = [4 * PATCHES] * 2, [2 * PATCHES, 4 * PATCHES]
    seen = [([one, two], full)] * 2 + [([one], both[:1])] + [([one, two], both)] * 3 + [([three], [PATCHES])]
    for layer in range(2):
        output = step.attend(layer, query, 0.3)
        for row, (pictures, lengths) in enumerate(seen):
            torch.testing.assert_close(output[row], expected_row(query[row], pictures, lengths, layer).float())


def test_a_checkpoint_with_other_aspect_ratios_is_refused(tmp_path):
    path = Path(make_mllama(tmp_path))
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["supported_aspect_ratios"] = [
        [1, 1],
        [4, 1],
        [1, 2],
        [1, 3],
        [1, 4],
        [2, 1],
        [2, 2],
        [3, 1],
    ]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"only all of up to max_num_tiles \(4\) tiles are supported"):
        load_model(EngineConfig(str(path), device="cpu", dtype="float32"))
