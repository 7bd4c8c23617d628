"""What a GPU computes equals what the CPU computes, for every served family: logits and greedy tokens.

The CPU's answers are held to Transformers' by the other tests of this folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from filmstrip.config import EngineConfig
from filmstrip.engine.engine import Engine, EngineLimits
from filmstrip.models.loader import load_model
from filmstrip.types import ProcessedPrompt
from tests.models import formats, glm_v, qwen2_vl, qwen3_omni, tiles
from tests.models.checkpoints import make_qwen3_vl
from tests.models.interns1_pro import make_interns1_pro
from tests.models.llama4 import make_llama4
from tests.models.minicpm_v import make_minicpm_v
from tests.models.mllama import make_mllama
from tests.models.molmo2 import make_molmo2
from tests.models.phi4_multimodal import make_phi4_multimodal
from tests.models.qwen3_5 import make_qwen3_5, make_text_only
from tests.models.text import ARCHITECTURES, make_text
from tests.parity.conftest import Case, build_prompts, image, user
from tests.parity.test_engine import RecordingModel, run

DEVICE = "cuda"
TOLERANCE = 1e-3

IMAGE_CASES = ["text_only", "image", "small_image"]
VIDEO_CASES = [*IMAGE_CASES, "video", "two_videos", "mixed", "odd_count"]


@dataclass(frozen=True)
class Family:
    """``make`` writes a checkpoint into a folder; ``cases`` are the conversations it takes, none for token ids alone."""

    make: Callable[..., object]
    cases: list[str]


def _first(make: Callable[..., tuple[str, str]], **how: str) -> Callable[..., str]:
    """Of makers that write a checkpoint and its reference."""
    return lambda path: make(path, **how)[0]


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
    "qwen3_omni": Family(qwen3_omni.make_qwen3_omni, VIDEO_CASES),
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
    "internvl_chat": Family(_first(formats.make_internvl_chat, text="Qwen2ForCausalLM"), IMAGE_CASES),
    "interns1": Family(_first(formats.make_interns1, text="Qwen3MoeForCausalLM"), IMAGE_CASES),
    "llava_original": Family(
        _first(formats.make_llava_original, architecture="LlavaLlamaForCausalLM", aspect="anyres"), IMAGE_CASES
    ),
    **{name: Family(partial(make_text, architecture=name), []) for name in ARCHITECTURES},
    **{
        name: Family(partial(make_text_only, architecture=name), [])
        for name in ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM")
    },
}


class AnyRecordingModel(RecordingModel):
    """Of recurrent models, too; what it remembers lies on the CPU."""

    def allocate_states(self, num_slots):
        self.model.allocate_states(num_slots)

    def copy_state(self, source, target):
        self.model.copy_state(source, target)

    def forward(self, batch):
        logits = self.model.forward(batch)
        self.rows += list(logits.cpu().clone())
        return logits


def answers(path, device, prompts, num_tokens_per_step):
    """Tokens and logits of prompts that are computed together."""
    model = load_model(EngineConfig(path, device=device, dtype="float32", num_threads=2))
    limits = EngineLimits(
        num_blocks=-(-20_000 // model.info.block_size),
        max_model_len=16_384,
        max_num_seqs=8,
        max_num_batched_tokens=num_tokens_per_step,
        encoder_cache_bytes=1 << 26,
        enable_prefix_caching=True,
        num_state_checkpoints=4,
    )
    return run(Engine(AnyRecordingModel(model), limits), prompts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_answers_as_the_cpu_does(name, cases, media_files, tmp_path):
    family = FAMILIES[name]
    path = str(family.make(tmp_path / "model") or tmp_path / "model")
    if family.cases:
        turns = [
            user(image(media_files["photo"]), "First?"),
            {"role": "assistant", "content": "A bar."},
            user("And ", image(media_files["strip"]), "?"),
        ]
        conversations = {case: cases[case] for case in family.cases} | {"turns": Case("turns", turns)}
        prompts = build_prompts(conversations, path)
    else:
        token_ids = np.random.default_rng(0).integers(0, 500, (3, 200))
        prompts = {str(n): ProcessedPrompt(row[:n].tolist()) for row, n in zip(token_ids, (7, 90, 200), strict=True)}
    expected = answers(path, "cpu", prompts, 4096)
    for num_tokens_per_step in (4096, 512):  # whole prompts, and what does not fit into one step
        found = answers(path, DEVICE, prompts, num_tokens_per_step)
        for prompt, (tokens, logits) in expected.items():
            assert found[prompt][0] == tokens, prompt
            np.testing.assert_allclose(found[prompt][1], logits, rtol=0, atol=TOLERANCE, err_msg=prompt)
