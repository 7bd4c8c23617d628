"""What a GPU computes equals what the CPU computes, for every served family: logits and greedy tokens.

The CPU's answers are held to Transformers' by the other tests of this folder.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from filmstrip.config import EngineConfig
from filmstrip.models.loader import load_model
from filmstrip.types import ProcessedPrompt
from tests.models import glm_v, qwen2_vl, qwen3_omni, tiles
from tests.models.checkpoints import make_qwen3_vl
from tests.models.interns1_pro import make_interns1_pro
from tests.models.llama4 import make_llama4
from tests.models.minicpm_v import make_minicpm_v
from tests.models.mllama import make_mllama
from tests.models.molmo2 import make_molmo2
from tests.models.phi4_multimodal import add_adapter, make_phi4_multimodal
from tests.models.qwen3_5 import make_qwen3_5, make_text_only
from tests.models.text import ARCHITECTURES, make_text
from tests.parity.conftest import Case, build_prompts, image, user
from tests.parity.test_engine import run
from tests.parity.test_formats import FAMILIES as FORMATS
from tests.parity.test_qwen3_5 import make_engine

DEVICE = "cuda"
TOLERANCE = 1e-3

IMAGE_CASES = ["text_only", "image", "small_image"]
VIDEO_CASES = [*IMAGE_CASES, "video", "two_videos", "mixed", "odd_count"]
NUM_TOKENS_PER_STEP = (4096, 65, 30)
"""Whole prompts; one row more than kernels take at a time; and fewer than any family's longest prompt has."""


@dataclass(frozen=True)
class Family:
    """``make`` writes a checkpoint into a folder, or one and its reference, and may say where.

    ``cases`` are the conversations it takes, none for token ids alone. ``num_frames`` is asked for of every video.
    """

    make: Callable[..., object]
    cases: list[str]
    num_frames: int | None = None


def _make_phi4_with_adapter(path: Path) -> None:
    make_phi4_multimodal(path)
    add_adapter(path)


FAMILIES = {
    "qwen3_vl": Family(make_qwen3_vl, VIDEO_CASES),
    "qwen3_vl_moe": Family(partial(make_qwen3_vl, moe=True), VIDEO_CASES),
    "qwen2_vl": Family(qwen2_vl.make_qwen2_vl, VIDEO_CASES),
    "qwen2_5_vl": Family(qwen2_vl.make_qwen2_5_vl, VIDEO_CASES),
    "qwen3_5": Family(make_qwen3_5, VIDEO_CASES),
    "qwen3_5_moe": Family(partial(make_qwen3_5, moe=True), VIDEO_CASES),
    "interns1_pro": Family(make_interns1_pro, VIDEO_CASES),
    "glm4v": Family(glm_v.make_glm4v, VIDEO_CASES),
    "glm4v_moe": Family(glm_v.make_glm4v_moe, VIDEO_CASES),
    "glm46v": Family(glm_v.make_glm46v, VIDEO_CASES),
    "glm46v_flash": Family(glm_v.make_glm46v_flash, VIDEO_CASES),
    "qwen3_omni": Family(qwen3_omni.make_qwen3_omni, VIDEO_CASES),
    "qwen3_omni_thinker": Family(qwen3_omni.make_qwen3_omni_thinker, VIDEO_CASES),
    "minicpm_v": Family(make_minicpm_v, VIDEO_CASES),
    "molmo2": Family(partial(make_molmo2, seed=7), VIDEO_CASES),
    "internvl": Family(tiles.make_internvl, VIDEO_CASES),
    "llava_onevision": Family(tiles.make_llava_onevision, VIDEO_CASES),
    "llava": Family(tiles.make_llava, IMAGE_CASES),
    "llava_siglip": Family(tiles.make_llava_siglip, IMAGE_CASES),
    "llava_next": Family(tiles.make_llava_next, IMAGE_CASES),
    "gemma3": Family(tiles.make_gemma3, IMAGE_CASES),
    "deepseek_vl": Family(tiles.make_deepseek_vl, IMAGE_CASES),
    "deepseek_vl_hybrid": Family(tiles.make_deepseek_vl_hybrid, IMAGE_CASES),
    "llama4": Family(make_llama4, IMAGE_CASES),
    "mllama": Family(make_mllama, IMAGE_CASES),
    "phi4_multimodal": Family(make_phi4_multimodal, IMAGE_CASES),
    "phi4_multimodal_adapted": Family(_make_phi4_with_adapter, IMAGE_CASES),
    **{
        name: Family(each.make, VIDEO_CASES if each.takes_video else IMAGE_CASES, each.num_frames)
        for name, each in FORMATS.items()
    },
    **{name: Family(partial(make_text, architecture=name), []) for name in ARCHITECTURES},
    **{
        name: Family(partial(make_text_only, architecture=name), [])
        for name in ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM")
    },
}


def answers(path, device, prompts, num_tokens_per_step):
    """Tokens and logits of prompts that are computed together."""
    model = load_model(EngineConfig(path, device=device, dtype="float32", num_threads=2))
    return run(make_engine(model, max_num_batched_tokens=num_tokens_per_step), prompts)


def conversations(family, cases, media_files, folder):
    """What ``family`` takes, several turns among it."""
    turns = [
        user(image(media_files["photo"]), "First?"),
        {"role": "assistant", "content": "A bar."},
        user("And ", image(media_files["strip"]), "?"),
    ]
    asked = None if family.num_frames is None else {"video": {"num_frames": family.num_frames}}
    chosen = {case: replace(cases[case], media_io_kwargs=asked) for case in family.cases}
    chosen["turns"] = Case("turns", turns)
    if family.make is make_interns1_pro:
        np.save(folder / "series.npy", np.random.default_rng(7).normal(size=(700, 2)).cumsum(axis=0))
        series = {"url": str(folder / "series.npy"), "sampling_rate": 100.0}
        parts = ({"type": "time_series_url", "time_series_url": series}, image(media_files["photo"]), "Compare.")
        chosen["series"] = Case("series", [user(*parts)])
    return chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_answers_as_the_cpu_does(name, cases, media_files, tmp_path):
    family, path = FAMILIES[name], tmp_path / "model"
    made = family.make(path)
    path = str(made[0] if isinstance(made, tuple) else path)
    if family.cases:
        prompts = build_prompts(conversations(family, cases, media_files, tmp_path), path)
    else:
        token_ids = np.random.default_rng(0).integers(0, 500, (3, 200))
        prompts = {str(n): ProcessedPrompt(row[:n].tolist()) for row, n in zip(token_ids, (7, 90, 200), strict=True)}
    assert max(len(prompt.token_ids) for prompt in prompts.values()) > min(NUM_TOKENS_PER_STEP)
    expected = answers(path, "cpu", prompts, NUM_TOKENS_PER_STEP[0])
    for num_tokens_per_step in NUM_TOKENS_PER_STEP:
        found = answers(path, DEVICE, prompts, num_tokens_per_step)
        for prompt, (tokens, logits) in expected.items():
            assert found[prompt][0] == tokens, prompt
            np.testing.assert_allclose(found[prompt][1], logits, rtol=0, atol=TOLERANCE, err_msg=prompt)
