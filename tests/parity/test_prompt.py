"""Prompts equal Transformers' processor's, value by value: pixels, grids, token ids, positions."""

import numpy as np
import pytest
import torch

from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.types import Modality
from tests.parity.conftest import build_prompts

CASES = [
    "text_only", "image", "small_image", "large_image", "video", "ntsc_video", "webm_video", "two_videos", "mixed",
    "odd_count", "one_frame", "tall", "wide", "tiny", "large", "chosen_frames", "many_turns",
]  # fmt: skip


def pixels(prompt, modality):
    """float32 pixel values of one modality, as the model gets them, or None."""
    parts = [
        normalize_patches(feature.patches.torch(), feature.normalization)
        for feature in prompt.features
        if feature.modality is modality
    ]
    return torch.cat(parts).numpy() if parts else None


def test_every_case_is_listed(cases):
    assert {name for name in cases if not name.startswith("real_")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_prompt_parity(name, prompts, references):
    check(prompts[name], references[name])


def test_prompt_parity_on_real_clips(prompts, references):
    for name in prompts:
        if name.startswith("real_"):
            check(prompts[name], references[name])


def check(prompt, reference):
    assert prompt.token_ids == reference["input_ids"][0].tolist()
    np.testing.assert_array_equal(prompt.positions, reference["positions"])
    assert [prompt.position_delta] * 3 == reference["delta"].tolist()
    for modality, values, grid in (
        (Modality.IMAGE, "pixel_values", "image_grid_thw"),
        (Modality.VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        ours = pixels(prompt, modality)
        assert (ours is None) == (values not in reference)
        if ours is not None:
            grids = [feature.grid_thw for feature in prompt.features if feature.modality is modality]
            assert [list(g) for g in grids] == reference[grid].tolist()
            np.testing.assert_array_equal(ours, reference[values])


def test_flat_form_has_no_outer_pair(cases, qwen3_vl_dir, prompts):
    """The original release's form: the template's own start and end around a video are replaced."""
    video = {"video": cases["video"]}
    nested = prompts["video"]
    flat = build_prompts(video, qwen3_vl_dir, video_prompt_form="flat")["video"]
    start = nested.token_ids.index(nested.token_ids[nested.features[0].segments[0].offset - 1])
    without_outer = nested.token_ids[:start] + nested.token_ids[start + 1 :]
    end = nested.features[0].segments[-1].end  # the inner end stands here, the outer one behind it
    del without_outer[end]
    assert flat.token_ids == without_outer
    assert [s.length for s in flat.features[0].segments] == [s.length for s in nested.features[0].segments]
