"""The engine's logits and greedy tokens equal Transformers' ``generate``, however a prompt is computed.

Logits within 1e-4 and all 32 tokens identical: alone, with seven others, in small chunks, after a prefix hit, after an
encoder hit, after preemption.
"""

import dataclasses

import numpy as np
import pytest
import torch

from filmstrip.config import EngineConfig
from filmstrip.engine.engine import Engine, EngineLimits
from filmstrip.models.loader import load_model
from filmstrip.types import SamplingParams
from tests.parity.conftest import MAX_NEW_TOKENS

TOLERANCE = 1e-4
PARAMS = SamplingParams(max_tokens=MAX_NEW_TOKENS, temperature=0, ignore_eos=True)
BATCH = ["video", "text_only", "mixed", "image", "two_videos", "odd_count", "many_turns", "tall"]


class RecordingModel:
    """The real model, remembering the logits of every request by the order in which rows were asked for."""

    def __init__(self, model):
        self.model, self.info, self.rows = model, model.info, []

    def allocate_kv_cache(self, num_blocks):
        self.model.allocate_kv_cache(num_blocks)

    def encode(self, items):
        return self.model.encode(items)

    def seen_media(self, offsets, start, end):
        return self.model.seen_media(offsets, start, end)

    def forward(self, batch):
        logits = self.model.forward(batch)
        self.rows += list(logits.to("cpu", copy=True))
        return logits


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(EngineConfig(checkpoint, device="cpu", dtype="float32", num_threads=2))


def make_engine(model, *, num_tokens=40_000, max_num_batched_tokens=4096, prefix=True, encoder_bytes=1 << 26, seqs=16):
    limits = EngineLimits(
        num_blocks=-(-num_tokens // model.info.block_size),
        max_model_len=16_384,
        max_num_seqs=seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        encoder_cache_bytes=encoder_bytes,
        enable_prefix_caching=prefix,
    )
    return Engine(RecordingModel(model), limits)


def run(engine, prompts):
    """Tokens and logits (num_new_tokens, vocab) of each prompt, all of them in the engine at the same time."""
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, PARAMS)
    tokens = {name: [] for name in prompts}
    logits = {name: [] for name in prompts}
    while engine.has_work:
        engine.model.rows = []
        outputs = engine.step()
        engine.check_integrity()
        assert all(output.error is None for output in outputs)
        for output, row in zip(outputs, engine.model.rows, strict=True):
            tokens[output.request_id] += output.new_token_ids
            logits[output.request_id].append(row)
    assert engine.stats()["num_allocated_blocks"] == 0
    return {name: (tokens[name], torch.stack(logits[name]).numpy()) for name in prompts}


def check(result, reference):
    tokens, logits = result
    assert tokens == reference["new_token_ids"].tolist()
    np.testing.assert_allclose(logits, reference["logits"], atol=TOLERANCE, rtol=0)


def test_answers_are_not_trivial(references):
    """Random weights must not make all cases alike, or the tests below would prove little."""
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in references.values()}
    assert len(answers) >= len(references) - 2
    assert all(len(set(answer)) > 4 for answer in answers)


def test_alone(model, prompts, references):
    for name, prompt in prompts.items():
        check(run(make_engine(model), {name: prompt})[name], references[name])


def test_in_a_batch_of_eight(model, prompts, references):
    results = run(make_engine(model), {name: prompts[name] for name in BATCH})
    for name in BATCH:
        check(results[name], references[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, prompts, references, chunk):
    names = ["mixed", "two_videos", "odd_count", "text_only"]
    engine = make_engine(model, max_num_batched_tokens=chunk, prefix=False)
    results = run(engine, {name: prompts[name] for name in names})
    for name in names:
        check(results[name], references[name])


def test_after_a_prefix_hit(model, prompts, references):
    engine = make_engine(model)
    names = ["video", "mixed", "many_turns"]
    run(engine, {name: prompts[name] for name in names})
    before = engine.stats()
    for name in names:
        check(run(engine, {name: prompts[name]})[name], references[name])
    after = engine.stats()
    hit = after["prefix_cache_hit_tokens"] - before["prefix_cache_hit_tokens"]
    block = engine.model.info.block_size
    assert hit == sum((len(prompts[name].token_ids) - 1) // block * block for name in names)


def test_after_an_encoder_hit(model, prompts, references):
    engine = make_engine(model, prefix=False)
    names = ["video", "two_videos", "mixed"]
    for name in names:
        run(engine, {name: prompts[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in names:
        check(run(engine, {name: prompts[name]})[name], references[name])
    assert engine.stats()["encoded_segments"] == encoded
    assert engine.stats()["prefix_cache_hit_tokens"] == 0


def test_with_an_encoder_cache_smaller_than_a_frame(model, prompts, references):
    engine = make_engine(model, encoder_bytes=1, max_num_batched_tokens=50)
    check(run(engine, {"mixed": prompts["mixed"]})["mixed"], references["mixed"])
    assert engine.stats()["encoder_cache_bytes"] == 0


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, prompts, references, prefix):
    names = BATCH[:5]
    longest = max(len(prompts[name].token_ids) for name in names) + MAX_NEW_TOKENS
    engine = make_engine(
        model, num_tokens=longest + 4 * model.info.block_size, prefix=prefix, max_num_batched_tokens=256
    )
    engine.limits = dataclasses.replace(engine.limits, max_model_len=longest)
    results = run(engine, {name: prompts[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], references[name])
