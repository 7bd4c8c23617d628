"""Encoding and packed forward passes of Qwen3-VL against the Transformers model run on each prompt alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from filmstrip.config import EngineConfig
from filmstrip.models import qwen_vl
from filmstrip.models.batch import EmbeddingPlacement
from filmstrip.models.loader import load_model
from filmstrip.models.qwen_vl import LinearPatchEmbed, normalize_patches
from filmstrip.types import Normalization
from tests.models.batches import PackedRequest, pack, text_request
from tests.models.prompts import PATCH_ROW, PromptBuilder

BLOCK_SIZE = 8
NUM_BLOCKS = 256
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, qwen3_vl_dir, qwen3_vl_moe_dir):
    """(ours, Transformers') of the same checkpoint."""
    path = qwen3_vl_dir if request.param == "dense" else qwen3_vl_moe_dir
    model = load_model(EngineConfig(model=path, device="cpu", num_threads=2, block_size=BLOCK_SIZE))
    model.allocate_kv_cache(NUM_BLOCKS)
    reference = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    return model, reference


def shuffled_blocks(num_blocks: int, seed: int = 0) -> list[int]:
    """``num_blocks`` distinct blocks in no order."""
    return torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed))[:num_blocks].tolist()


def blocks_for(builders: list[PromptBuilder], extra_tokens: int = 0) -> list[list[int]]:
    """Distinct blocks for each prompt."""
    counts = [-(-(len(builder.token_ids) + extra_tokens) // BLOCK_SIZE) for builder in builders]
    pool = iter(shuffled_blocks(sum(counts)))
    return [[next(pool) for _ in range(count)] for count in counts]


@torch.inference_mode()
def reference_logits(reference, builder: PromptBuilder) -> torch.Tensor:
    """Logits of every row of the prompt, (L, vocab_size)."""
    reference.model.rope_deltas = None
    return reference(**builder.reference_inputs()).logits[0]


def prompts(config) -> dict[str, PromptBuilder]:
    """Every mixture of text, images and videos."""
    return {
        "text": PromptBuilder(config, 1).text(30),
        "image": PromptBuilder(config, 2).text(5).image(4, 6).text(7),
        "video": PromptBuilder(config, 3).text(3).video(3, 4, 4).text(4),
        "two videos": PromptBuilder(config, 4).text(2).video(2, 2, 6).text(1).video(1, 6, 4).text(9),
        "image, video, image": PromptBuilder(config, 5).image(2, 2).text(2).video(2, 4, 6).image(8, 2).text(3),
    }


@pytest.mark.parametrize("name", ["text", "image", "video", "two videos", "image, video, image"])
def test_logits_of_a_whole_prompt_equal_the_full_model(models, name):
    model, reference = models
    builder = prompts(reference.config)[name]
    request = builder.request(model, reference, blocks_for([builder])[0])
    logits = model.forward(pack([(request, 0, len(request.token_ids))], BLOCK_SIZE, all_logits=True))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference_logits(reference, builder), atol=LOGITS_TOLERANCE, rtol=0)


def test_packed_prompts_do_not_see_each_other(models):
    model, reference = models
    builders = list(prompts(reference.config).values())
    requests = [
        builder.request(model, reference, blocks)
        for builder, blocks in zip(builders, blocks_for(builders), strict=True)
    ]
    logits = model.forward(pack([(request, 0, len(request.token_ids)) for request in requests], BLOCK_SIZE))
    expected = torch.stack([reference_logits(reference, builder)[-1] for builder in builders])
    torch.testing.assert_close(logits, expected, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 5, 13])
def test_chunks_that_cut_media_give_the_same_logits(models, chunk):
    """Embeddings and DeepStack rows are sliced where a chunk ends inside a frame; later chunks read cached pages."""
    model, reference = models
    builder = prompts(reference.config)["image, video, image"]
    request = builder.request(model, reference, blocks_for([builder])[0])
    length = len(request.token_ids)
    rows = [
        model.forward(pack([(request, start, min(start + chunk, length))], BLOCK_SIZE, all_logits=True))
        for start in range(0, length, chunk)
    ]
    torch.testing.assert_close(torch.cat(rows), reference_logits(reference, builder), atol=LOGITS_TOLERANCE, rtol=0)


def test_greedy_tokens_equal_generate(models):
    """Prompts of different length decode together, one of them joins late; each gets the tokens it gets alone."""
    model, reference = models
    num_new = 32
    builders = list(prompts(reference.config).values())
    blocks = blocks_for(builders, num_new)
    requests = [builder.request(model, reference, owned) for builder, owned in zip(builders, blocks, strict=True)]
    prompt_lens = [len(request.token_ids) for request in requests]
    late = requests[-1]
    chunks = [(request, 0, len(request.token_ids)) for request in requests if request is not late]
    while chunks:
        next_ids = model.forward(pack(chunks, BLOCK_SIZE)).argmax(dim=-1).tolist()
        for (request, _, _), token_id in zip(chunks, next_ids, strict=True):
            request.token_ids.append(token_id)
            request.positions = torch.cat(
                [request.positions, request.positions[:, -1:].max() + torch.ones(3, 1).long()], 1
            )
        if late not in [request for request, _, _ in chunks] and len(late.token_ids) == prompt_lens[-1]:
            chunks.append((late, 0, 0))
        chunks = [
            (request, end, len(request.token_ids))
            for (request, _, end) in chunks
            if len(request.token_ids) < prompt_lens[requests.index(request)] + num_new
        ]
    for request, builder, prompt_len in zip(requests, builders, prompt_lens, strict=True):
        reference.model.rope_deltas = None
        generated = reference.generate(
            **builder.reference_inputs(),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            eos_token_id=None,
        )
        assert request.token_ids[prompt_len:] == generated[0, prompt_len:].tolist()


def test_media_rows_are_found_by_range_never_by_id(models):
    """Ids under media rows may be anything, and a placeholder id outside of a range is text."""
    model, reference = models
    config = reference.config
    builder = PromptBuilder(config, 6).text(4).image(4, 4).text(3)
    expected = reference_logits(reference, builder)
    request = builder.request(model, reference, blocks_for([builder])[0])
    for odd_id in (-1, 0, 10**9):
        for place, _ in request.media:
            request.token_ids[place.offset : place.end] = [odd_id] * place.length
        logits = model.forward(pack([(request, 0, len(request.token_ids))], BLOCK_SIZE, all_logits=True))
        torch.testing.assert_close(logits, expected, atol=LOGITS_TOLERANCE, rtol=0)

    typed = PromptBuilder(config, 7).text(3).ids([config.image_token_id, config.video_token_id]).text(5)
    with torch.inference_mode():
        text_positions = torch.arange(len(typed.token_ids)).expand(4, 1, -1)
        hidden = reference.model.language_model(torch.tensor([typed.token_ids]), position_ids=text_positions)
        expected = reference.lm_head(hidden.last_hidden_state[0])
    request = text_request(typed.token_ids, shuffled_blocks(2))
    logits = model.forward(pack([(request, 0, len(request.token_ids))], BLOCK_SIZE, all_logits=True))
    torch.testing.assert_close(logits, expected, atol=LOGITS_TOLERANCE, rtol=0)


def test_pixels_and_deepstack_levels_change_the_answer(models):
    model, reference = models
    builder = prompts(reference.config)["video"]
    request = builder.request(model, reference, blocks_for([builder])[0])

    def last_logits(request: PackedRequest) -> torch.Tensor:
        return model.forward(pack([(request, 0, len(request.token_ids))], BLOCK_SIZE))

    logits = last_logits(request)
    for level in range(model.info.num_embedding_rows):
        changed = [(place, rows.index_fill(1, torch.tensor(level), 0.0)) for place, rows in request.media]
        assert (last_logits(replace(request, media=changed)) - logits).abs().max() > 0.1


def test_encode_takes_several_items_and_returns_one_tensor_for_each_segment(models):
    model, reference = models
    builder = PromptBuilder(reference.config, 8).image(4, 6).video(3, 2, 8).image(2, 2).video(1, 4, 4)
    encoded = model.encode([part.encoder_input for part in builder.media])
    assert [len(segments) for segments in encoded] == [1, 3, 1, 1]
    for part, segments in zip(builder.media, encoded, strict=True):
        pixels = normalize_patches(part.patches, Normalization((0.5,) * 3, (0.5,) * 3))
        with torch.inference_mode():
            output = reference.model.visual(pixels, grid_thw=torch.tensor([part.grid_thw]))
        expected = torch.stack([output.pooler_output, *output.deepstack_features], dim=1)
        torch.testing.assert_close(torch.cat(segments), expected, atol=LOGITS_TOLERANCE, rtol=0)
        for segment in segments:
            assert segment.shape == (part.segments[0].length, 4, model.info.hidden_size)
            assert segment.dtype == model.info.dtype
            assert segment.untyped_storage().nbytes() == segment.numel() * segment.element_size()


def test_encode_in_turns_equals_encode_at_once(models, monkeypatch):
    """A long video goes through the tower in runs of whole segments, whose number bounds the memory."""
    model, reference = models
    parts = PromptBuilder(reference.config, 9).video(5, 4, 4).image(4, 8).image(2, 2).media
    at_once = model.encode([part.encoder_input for part in parts])
    sizes = []
    visual = reference.model.visual.__class__.forward
    monkeypatch.setattr(qwen_vl, "MAX_PATCHES_PER_FORWARD", 40)
    monkeypatch.setattr(
        reference.model.visual.__class__,
        "forward",
        lambda self, pixels, **kwargs: sizes.append(len(pixels)) or visual(self, pixels, **kwargs),
    )
    in_turns = model.encode([part.encoder_input for part in parts])
    assert sizes == [32, 32, 16, 36]
    for one, other in zip(at_once, in_turns, strict=True):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_encode_depends_on_the_pixels_of_a_segment_only(models):
    model, reference = models
    part = PromptBuilder(reference.config, 10).video(3, 4, 4).media[0]
    before = model.encode([part.encoder_input])[0]
    changed = part.patches.clone()
    changed[16:32] = 255 - changed[16:32]
    after = model.encode([replace(part.encoder_input, patches=changed)])[0]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert (before[1] - after[1]).abs().max() > 0.1


def test_linear_patch_embedding_equals_the_convolution():
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 40, (2, 16, 16), stride=(2, 16, 16))
    patches = torch.rand(50, PATCH_ROW) * 2 - 1
    expected = convolution(patches.view(50, 3, 2, 16, 16)).view(50, 40)
    torch.testing.assert_close(LinearPatchEmbed(convolution)(patches), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ],
)
def test_normalization_rounds_like_the_reference(mean, std):
    """Every byte value in every channel, step by step in single precision."""
    row = np.tile(np.arange(256, dtype=np.uint8), 2)
    patches = torch.from_numpy(np.tile(row, (2, 3)))
    expected = np.empty((3, 512), dtype=np.float32)
    for channel in range(3):
        shift = np.float32(np.float32(mean[channel]) * np.float32(255))
        scale = np.float32(np.float32(std[channel]) * np.float32(255))
        expected[channel] = [np.float32(np.float32(np.float32(value) - shift) / scale) for value in row]
    normalized = normalize_patches(patches, Normalization(mean, std))
    assert normalized.dtype == torch.float32
    assert np.array_equal(normalized.numpy(), np.tile(expected.reshape(1, -1), (2, 1)))


@pytest.mark.parametrize(("first", "second", "message"), [(3, 4, "overlap"), (3, 9, "end at 11")])
def test_wrong_placements_are_refused(models, first, second, message):
    model, _ = models
    batch = pack([(text_request(list(range(10)), shuffled_blocks(2)), 0, 10)], BLOCK_SIZE)
    rows = torch.zeros(2, model.info.num_embedding_rows, model.info.hidden_size)
    batch.placements = [EmbeddingPlacement(second, rows), EmbeddingPlacement(first, rows)]
    with pytest.raises(ValueError, match=message):
        model.forward(batch)


def test_info_describes_the_cache(models, qwen3_vl_dir):
    model, reference = models
    text = reference.config.text_config
    numbers_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert model.info.block_size == BLOCK_SIZE
    assert model.info.num_embedding_rows == 4
    assert model.info.vocab_size == text.vocab_size
    # K pages of 8 tokens are padded to vectors of 16.
    assert model.info.kv_bytes_per_token == numbers_per_token * 4 * 3 // 2
    suggested = load_model(EngineConfig(model=qwen3_vl_dir, device="cpu", dtype="bfloat16", num_threads=2)).info
    assert suggested.block_size == 32
    assert suggested.kv_bytes_per_token == numbers_per_token * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 1.0)])
def test_logits_on_a_gpu(qwen3_vl_dir, dtype, tolerance):
    """Two prompts with media, the second in two chunks, in the pages that suit the device."""
    model = load_model(EngineConfig(model=qwen3_vl_dir, device="cuda", dtype=dtype, num_threads=2))
    model.allocate_kv_cache(32)
    reference = AutoModelForImageTextToText.from_pretrained(qwen3_vl_dir, attn_implementation="eager").eval()
    first, second = (prompts(reference.config)[name] for name in ("video", "image, video, image"))
    requests = [first.request(model, reference, [3, 1]), second.request(model, reference, [0, 7, 5])]
    cut, block_size = len(requests[1].token_ids) // 2, model.info.block_size
    chunks = [(requests[0], 0, len(requests[0].token_ids)), (requests[1], 0, cut)]
    logits = model.forward(pack(chunks, block_size, all_logits=True, device=model.info.device))
    rest = model.forward(
        pack([(requests[1], cut, len(requests[1].token_ids))], block_size, all_logits=True, device=model.info.device)
    )
    expected = torch.cat([reference_logits(reference, first), reference_logits(reference, second)])
    torch.testing.assert_close(torch.cat([logits, rest]).cpu(), expected, atol=tolerance, rtol=0)
