"""Text-only models with gated DeltaNet layers: the engine's logits and greedy tokens equal Transformers' ``generate``."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from filmstrip.config import EngineConfig
from filmstrip.engine.engine import Engine, EngineLimits
from filmstrip.models.loader import load_model
from filmstrip.types import ProcessedPrompt
from tests.models.qwen3_5 import make_text_only
from tests.parity.conftest import MAX_NEW_TOKENS
from tests.parity.test_engine import check, run
from tests.parity.test_qwen3_5 import RecordingRecurrentModel

LENGTHS = [1, 2, 3, 40, 170, 300]


def prompts():
    """Random prompts; the two longest begin alike."""
    token_ids = np.random.default_rng(0).integers(0, 500, (len(LENGTHS), max(LENGTHS)))
    token_ids[-1, :150] = token_ids[-2, :150]
    return {str(length): ProcessedPrompt(row[:length].tolist()) for length, row in zip(LENGTHS, token_ids, strict=True)}


@pytest.fixture(scope="module", params=["Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM"])
def path(request, tmp_path_factory):
    return make_text_only(tmp_path_factory.mktemp("text_only"), request.param)


@pytest.fixture(scope="module")
def expected(path):
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers = {}
    for name, prompt in prompts().items():
        ids = torch.tensor([prompt.token_ids])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers[name] = {
            "new_token_ids": generated.sequences[0, ids.shape[1] :].numpy(),
            "logits": torch.cat(generated.logits).numpy(),
        }
    return answers


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2, block_size=8))


def make_engine(model, *, num_tokens=4096, budget=2048, prefix=True):
    limits = EngineLimits(
        num_blocks=num_tokens // model.info.block_size,
        max_model_len=num_tokens,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        encoder_cache_bytes=0,
        enable_prefix_caching=prefix,
        num_state_checkpoints=4,
    )
    return Engine(RecordingRecurrentModel(model), limits)


def check_all(results, expected):
    for name, result in results.items():
        check(result, expected[name])


def test_alone(model, expected):
    for name, prompt in prompts().items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


@pytest.mark.parametrize(("budget", "prefix"), [(2, False), (17, True), (2048, True)])
def test_together_in_chunks(model, expected, budget, prefix):
    check_all(run(make_engine(model, budget=budget, prefix=prefix), prompts()), expected)


def test_from_a_kept_state(model, expected):
    """The same prompt again begins at its end; one that parts from it at token 150 begins where a chunk ended before."""
    engine = make_engine(model, budget=64)
    check_all(run(engine, {"170": prompts()["170"]}), expected)
    check_all(run(engine, {"300": prompts()["300"]}), expected)
    assert engine.stats()["prefix_cache_hit_tokens"] == 128
    check_all(run(engine, {"170": prompts()["170"]}), expected)
    assert engine.stats()["prefix_cache_hit_tokens"] == 128 + 168


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, expected, prefix):
    engine = make_engine(model, num_tokens=560, prefix=prefix)
    check_all(run(engine, prompts()), expected)
    assert engine.stats()["num_preemptions"] > 0
