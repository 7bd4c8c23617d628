"""Text-only checkpoints: the engine's logits and greedy tokens equal Transformers' ``generate``; media are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from filmstrip import LLM, SamplingParams
from filmstrip.config import EngineConfig
from filmstrip.errors import InvalidRequestError, ModelLoadError
from filmstrip.models.loader import load_model
from filmstrip.types import ProcessedPrompt
from tests.models.qwen3_5 import make_text_only
from tests.models.text import ARCHITECTURES, make_text
from tests.parity.conftest import MAX_NEW_TOKENS
from tests.parity.test_engine import check, make_engine, run

LENGTHS = [1, 2, 40, 170, 300]


def prompts():
    """Random prompts; the two longest begin alike."""
    token_ids = np.random.default_rng(0).integers(0, 500, (len(LENGTHS), max(LENGTHS)))
    token_ids[-1, :150] = token_ids[-2, :150]
    return {str(length): ProcessedPrompt(row[:length].tolist()) for length, row in zip(LENGTHS, token_ids, strict=True)}


SLIDING = {
    "MistralForCausalLM-sliding": {"sliding_window": 40},
    "Qwen2ForCausalLM-sliding": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
}
"""Windows shorter than the prompts, in all layers and in some."""


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *SLIDING])
def path(request, tmp_path_factory):
    architecture, fields = request.param.partition("-")[0], SLIDING.get(request.param, {})
    return make_text(tmp_path_factory.mktemp("text"), architecture, **fields)


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
    assert len({tuple(answer["new_token_ids"]) for answer in answers.values()}) == len(LENGTHS)
    return answers


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2, block_size=8))


def check_all(results, expected):
    for name, result in results.items():
        check(result, expected[name])


def test_alone(model, expected):
    for name, prompt in prompts().items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


@pytest.mark.parametrize(("budget", "prefix"), [(7, False), (64, True), (4096, True)])
def test_together_in_chunks(model, expected, budget, prefix):
    check_all(run(make_engine(model, max_num_batched_tokens=budget, prefix=prefix), prompts()), expected)


def test_after_a_prefix_hit(model, expected):
    engine = make_engine(model)
    check_all(run(engine, {"170": prompts()["170"]}), expected)
    check_all(run(engine, {"300": prompts()["300"]}), expected)
    assert engine.stats()["prefix_cache_hit_tokens"] == 144


def test_after_preemption(model, expected):
    engine = make_engine(model, num_tokens=560)
    check_all(run(engine, prompts()), expected)
    assert engine.stats()["num_preemptions"] > 0


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
def test_from_messages_to_words(architecture, tmp_path):
    make = make_text if architecture in ARCHITECTURES else make_text_only
    path = make(tmp_path / "model", architecture)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor(
        [tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]]
    )
    reference: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    generated = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    with LLM(path, device="cpu", dtype="float32", num_threads=2, kv_cache_gb=0.01) as llm:
        out = llm.chat(messages, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
        assert out.usage.prompt_tokens == ids.shape[1]
        assert out.token_ids == generated[0, ids.shape[1] :].tolist()
        part = {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/never-fetched.mp4"}}
        with pytest.raises(InvalidRequestError, match="takes no video_url; it takes text only") as refused:
            llm.chat([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])
        assert refused.value.param == "messages[0].content[0].video_url.url"


def _longrope(head_dim):
    factors = {"short_factor": [1.0] * (head_dim // 2), "long_factor": [2.0] * (head_dim // 2)}
    return {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256, **factors}


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "sets final_logit_softcapping"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "sets use_bidirectional_attention"),
        (
            "Gemma3ForCausalLM",
            {
                "rope_parameters": {
                    "full_attention": _longrope(32),
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                }
            },
            "'longrope'",
        ),
        ("LlamaForCausalLM", {"rope_parameters": _longrope(16)}, "'longrope'"),
    ],
)
def test_what_would_be_computed_wrongly_is_not_loaded(tmp_path, architecture, fields, named):
    path = make_text(tmp_path, architecture, **fields)
    with pytest.raises(ModelLoadError, match=named):
        load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=1))
