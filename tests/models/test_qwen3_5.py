"""Qwen3.5 and Qwen3-Next against Transformers: packed, chunked, with used slots, and beside neighbours of any length."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from filmstrip.config import EngineConfig
from filmstrip.models.gated_delta_net import PackedGatedDeltaNet
from filmstrip.models.loader import load_model
from filmstrip.models.registry import supported_architectures
from tests.models.batches import PackedRequest, pack, text_request
from tests.models.prompts import PromptBuilder
from tests.models.qwen3_5 import make_qwen3_5, make_text_only

BLOCK_SIZE = 8
NUM_BLOCKS, NUM_SLOTS = 256, 8
TOLERANCE = 1e-4
TEXT_ONLY = ["Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM"]


def load(path, dtype="auto") -> Any:
    """The checkpoint with every page and state full of rubbish, as memory is after other requests."""
    model: Any = load_model(EngineConfig(model=path, device="cpu", dtype=dtype, num_threads=2, block_size=BLOCK_SIZE))
    model.allocate_kv_cache(NUM_BLOCKS)
    model.allocate_states(NUM_SLOTS)
    spoil_states(model)
    return model


def spoil_states(model):
    model._states.windows.fill_(float("nan"))
    model._states.matrices.fill_(float("nan"))


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, tmp_path_factory):
    """(ours, Transformers') of the same checkpoint."""
    path = make_qwen3_5(tmp_path_factory.mktemp("qwen3_5"), moe=request.param == "moe")
    return load(path), AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=TEXT_ONLY)
def text_models(request, tmp_path_factory):
    path = make_text_only(tmp_path_factory.mktemp("text"), request.param)
    return load(path), AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def blocks_for(lengths):
    pool = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist())
    return [[next(pool) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


def with_slots(batch, slots):
    batch.state_slots = torch.tensor(slots)
    return batch


@torch.inference_mode()
def reference_logits(reference, builder):
    reference.model.rope_deltas = None
    return reference(**builder.reference_inputs()).logits[0]


def prompts(config):
    return {
        "text": PromptBuilder(config, 1).text(30),
        "image": PromptBuilder(config, 2).text(5).image(4, 6).text(7),
        "video": PromptBuilder(config, 3).text(3).video(3, 4, 4).text(4),
        "two videos": PromptBuilder(config, 4).text(2).video(2, 2, 6).text(1).video(1, 6, 4).text(9),
        "image, video, image": PromptBuilder(config, 5).image(2, 2).text(2).video(2, 4, 6).image(8, 2).text(90),
    }


def requests_of(model, reference, builders):
    owned = blocks_for([len(builder.token_ids) for builder in builders])
    return [builder.request(model, reference, blocks) for builder, blocks in zip(builders, owned, strict=True)]


@pytest.mark.parametrize("name", ["text", "image", "video", "two videos", "image, video, image"])
def test_logits_of_a_whole_prompt_equal_the_full_model(models, name):
    model, reference = models
    builder = prompts(reference.config)[name]
    request = requests_of(model, reference, [builder])[0]
    batch = pack([(request, 0, len(request.token_ids))], BLOCK_SIZE, all_logits=True)
    logits = model.forward(with_slots(batch, [3]))
    torch.testing.assert_close(logits, reference_logits(reference, builder), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, 65])
def test_packed_chunks_of_any_size_equal_the_whole(models, chunk):
    """All prompts at once, in chunks shorter than the convolution and longer than a chunk of the delta rule."""
    model, reference = models
    builders = list(prompts(reference.config).values())
    check_chunks(
        model, requests_of(model, reference, builders), chunk, [reference_logits(reference, b) for b in builders]
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 70, 1000])
def test_text_only_models(text_models, chunk):
    model, reference = text_models
    lengths = [1, 2, 3, 4, 66, 131]
    generator = torch.Generator().manual_seed(1)
    token_ids = [torch.randint(0, 500, (length,), generator=generator).tolist() for length in lengths]
    requests = [text_request(ids, blocks) for ids, blocks in zip(token_ids, blocks_for(lengths), strict=True)]
    with torch.inference_mode():
        expected = [reference(torch.tensor([ids])).logits[0] for ids in token_ids]
    check_chunks(model, requests, chunk, expected)


def check_chunks(model, requests: list[PackedRequest], chunk: int, expected: list[torch.Tensor]) -> None:
    """Run all requests in chunks; a request's first chunk is as long as its number, so that chunk ends differ."""
    spoil_states(model)
    done = [0] * len(requests)
    rows: list[list[torch.Tensor]] = [[] for _ in requests]
    first = True
    while any(count < len(request.token_ids) for count, request in zip(done, requests, strict=True)):
        chunks, who = [], []
        for index, request in enumerate(requests):
            size = index + 1 if first else chunk
            end = min(done[index] + size, len(request.token_ids))
            if end > done[index]:
                chunks.append((request, done[index], end))
                who.append(index)
        logits = model.forward(with_slots(pack(chunks, BLOCK_SIZE, all_logits=True), [7 - index for index in who]))
        for index, part, (_, _, end) in zip(
            who, logits.split([end - start for _, start, end in chunks]), chunks, strict=True
        ):
            rows[index].append(part)
            done[index] = end
        first = False
    for parts, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), wanted, atol=TOLERANCE, rtol=0)


def test_a_copied_state_goes_on_where_it_was_copied(models):
    model, reference = models
    builder = prompts(reference.config)["image, video, image"]
    request = requests_of(model, reference, [builder])[0]
    length, cut = len(request.token_ids), 70
    model.forward(with_slots(pack([(request, 0, cut)], BLOCK_SIZE), [2]))
    model.copy_state(2, 5)
    other = text_request([9] * 20, blocks_for([400, 20])[1])
    model.forward(with_slots(pack([(other, 0, 20)], BLOCK_SIZE), [2]))
    batch = pack([(request, cut, length)], BLOCK_SIZE, all_logits=True)
    logits = model.forward(with_slots(batch, [5]))
    expected = reference_logits(reference, builder)[cut:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_a_state_is_as_large_as_the_model_says(models):
    model, _ = models
    states = model._states
    total = sum(each.numel() * each.element_size() for each in (states.windows, states.matrices))
    assert total == NUM_SLOTS * model.info.state_bytes_per_request
    assert states.matrices.dtype == torch.float32


def test_only_full_attention_layers_have_pages(models):
    model, reference = models
    kinds = reference.config.text_config.layer_types
    assert len(model._attention.pages) == kinds.count("full_attention")
    assert len(model._states.matrices) == kinds.count("linear_attention")


def test_weights_of_the_prediction_head_are_skipped_in_silence(tmp_path, caplog):
    path = make_qwen3_5(tmp_path / "checkpoint")
    with caplog.at_level(logging.WARNING):
        load(path)
    assert "mtp" not in caplog.text
    assert "not used" not in caplog.text


def test_bfloat16_keeps_fp32_matrices(tmp_path):
    path = make_qwen3_5(tmp_path / "checkpoint")
    model = load(path, "bfloat16")
    assert model._states.matrices.dtype == torch.float32
    assert model._states.windows.dtype == torch.bfloat16
    exact = load(path)
    ids = list(range(40))
    request = text_request(ids, blocks_for([40])[0])
    ours, wanted = (
        each.forward(with_slots(pack([(request, 0, 40)], BLOCK_SIZE, all_logits=True), [1])) for each in (model, exact)
    )
    assert (ours - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_a_forward_pass_without_its_step_is_refused(models):
    model, _ = models
    batch = pack([(text_request([1, 2], [0]), 0, 2)], BLOCK_SIZE)
    with pytest.raises(ValueError, match="must say where they are"):
        model.forward(batch)
    layer = next(each for each in model._language_model.modules() if isinstance(each, PackedGatedDeltaNet))
    with pytest.raises(ValueError, match="delta_step"):
        layer(torch.zeros(1, 2, 64))
    step = model._states.begin(with_slots(batch, [0]))
    with pytest.raises(ValueError, match="no mask and no cache"):
        layer(torch.zeros(1, 2, 64), delta_step=step, attention_mask=torch.ones(1, 2))


def test_text_models_refuse_media(text_models):
    model, _ = text_models
    assert model.encode([]) == []
    with pytest.raises(ValueError, match="text only"):
        model.encode([None])


def test_architectures_are_listed():
    assert {*TEXT_ONLY, "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"} <= set(
        supported_architectures()
    )
