"""Intern-S1-Pro's modules equal the slow reference in double precision, and Transformers' own where they are the same."""

import json

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from filmstrip.config import EngineConfig
from filmstrip.errors import ModelLoadError
from filmstrip.models import interns1_pro_time_series as time_series
from filmstrip.models.base import EncoderInput
from filmstrip.models.loader import load_model
from filmstrip.types import Modality, Normalization, PlaceholderRange
from tests.models.batches import PackedRequest, pack, text_request
from tests.models.interns1_pro import make_interns1_pro
from tests.models.interns1_pro_reference import Reference, hop_of

TOLERANCE = 1e-4
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PLAIN_ROPE = {"rope_type": "default"}
FOPE = {"rope_type": "default", "fope_sep_head": True}
SERIES = [(5, 1, None), (900, 2, 50), (700, 1, 100), (333, 3, None), (3000, 1, 8000), (200, 1, 3), (49, 4, 100)]


def load(path):
    model = load_model(EngineConfig(str(path), device="cpu", dtype="float32", num_threads=2, block_size=8))
    model.allocate_kv_cache(256)
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_interns1_pro(tmp_path_factory.mktemp("interns1_pro"))


@pytest.fixture(scope="module")
def model(path):
    return load(path)


@pytest.fixture(scope="module")
def reference(path):
    return Reference(path)


def tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, 500, length).tolist()


def series(num_samples, num_channels, seed=0):
    """A random walk, far from 0 and not of unit size."""
    steps = np.random.default_rng([seed, num_samples, num_channels]).normal(size=(num_samples, num_channels))
    return 100 + 7 * steps.cumsum(axis=0)


def series_input(samples, sampling_rate=None):
    normalised = (samples - samples.mean(axis=0)) / (samples.std(axis=0) + 1e-8)
    hop = hop_of(sampling_rate or max(len(samples) / 4, 1))
    values = torch.from_numpy(normalised.astype(np.float32))
    return EncoderInput(Modality.TIME_SERIES, values, (1, 1, 1), HALF, 1, hop=hop)


def picture_input(grid, seed=0, modality=Modality.VIDEO):
    num_patches = grid[0] * grid[1] * grid[2]
    patches = np.random.default_rng([seed, *grid]).integers(0, 256, (num_patches, 1536)).astype(np.uint8)
    return EncoderInput(modality, torch.from_numpy(patches), grid, HALF, grid[0])


def picture_rows(reference, item):
    return reference.picture_rows((item.patches.numpy() / 255 - 0.5) / 0.5, item.grid_thw)


def blocks(first, num_tokens, size=8):
    return list(range(first, first + -(-num_tokens // size)))


def check_text(path, **options):
    model, reference = load(path), Reference(path)
    for length in (1, 37):
        ids = tokens(length)
        logits = model.forward(pack([(text_request(ids, blocks(0, length)), 0, length)], 8))
        expected = reference.logits_after(reference.text_rows(ids))
        reference.forget()
        np.testing.assert_allclose(logits[0].numpy(), expected, atol=TOLERANCE, rtol=0)
        assert np.ptp(expected) > 5


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"rope_scaling": FOPE | {"num_inv_freq": None}, "max_position_embeddings": 64},
        {"rope_scaling": FOPE | {"num_inv_freq": 16}, "attention_bias": False},
        {"rope_parameters": FOPE | {"fope_num_inv_freq": 7, "rope_theta": 5000.0}, "rope_scaling": None},
        {"rope_scaling": PLAIN_ROPE},
        {"router_n_groups": -1, "norm_topk_prob": False},
        {"router_n_groups": 4, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "mlp_only_layers": []},
    ],
    ids=[
        "as_published",
        "by_period",
        "all_frequencies",
        "new_words",
        "plain_rope",
        "no_groups",
        "one_kv_head",
        "all_sparse",
    ],
)
def test_text(tmp_path, text):
    check_text(make_interns1_pro(tmp_path, text=text))


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("architecture", ["InternS1ProForConditionalGeneration", "InternS1_1_ForConditionalGeneration"])
def test_weights_as_published(tmp_path, layout, architecture):
    check_text(make_interns1_pro(tmp_path, expert_layout=layout, architecture=architecture))


def test_tied_embeddings(tmp_path):
    check_text(make_interns1_pro(tmp_path, tie_word_embeddings=True))


def test_in_bfloat16(path, reference):
    model = load_model(EngineConfig(path, device="cpu", dtype="bfloat16", num_threads=2))
    model.allocate_kv_cache(8)
    samples, ids = series(700, 2), tokens(40)
    (rows,) = model.encode([series_input(samples, 100)])[0]
    assert rows.dtype == torch.bfloat16
    np.testing.assert_allclose(rows[:, 0].float().numpy(), reference.series_rows(samples, 100), atol=0.1, rtol=0)
    request = text_request(ids, blocks(0, 40, model.info.block_size))
    logits = model.forward(pack([(request, 0, 40)], model.info.block_size))
    expected = reference.logits_after(reference.text_rows(ids))
    reference.forget()
    np.testing.assert_allclose(logits[0].numpy(), expected, atol=1.0, rtol=0)


def test_is_qwen3_moe_without_fope_and_groups(tmp_path):
    path = make_interns1_pro(tmp_path, text={"rope_scaling": None, "router_n_groups": None})
    model, reference = load(path), Reference(path)
    fields = {key: value for key, value in reference.text.items() if key not in ("model_type", "rope_scaling")}
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).eval()
    mine = {"model." + name: weight for name, weight in model._language_model.state_dict().items()}
    theirs.load_state_dict(mine | {"lm_head.weight": model._lm_head.weight})
    ids = tokens(60)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    logits = model.forward(pack([(text_request(ids, blocks(0, 60)), 0, 60)], 8, all_logits=True))
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("num_samples", "num_channels", "rate"), SERIES)
def test_time_series(model, reference, num_samples, num_channels, rate):
    samples = series(num_samples, num_channels)
    (rows,) = model.encode([series_input(samples, rate)])[0]
    expected = reference.series_rows(samples, rate)
    np.testing.assert_allclose(rows[:, 0].numpy(), expected, atol=1e-5, rtol=0)
    assert np.ptp(expected) > 1


def test_time_series_in_parts(model, monkeypatch):
    """Windows go through the encoder a few at a time, and channels of a window, too."""
    item = series_input(series(300, 3), 100)
    (whole,) = model.encode([item])[0]
    for limit in (1, 50, 100, 500):
        monkeypatch.setattr(time_series, "MAX_SAMPLES_PER_FORWARD", limit)
        torch.testing.assert_close(model.encode([item])[0][0], whole, atol=1e-5, rtol=0)


def test_time_series_without_optional_weights(tmp_path):
    path = make_interns1_pro(tmp_path, with_optional_weights=False)
    samples = series(500, 1)
    (rows,) = load(path).encode([series_input(samples, 60)])[0]
    np.testing.assert_allclose(rows[:, 0].numpy(), Reference(path).series_rows(samples, 60), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 6, 10), (2, 16, 4)])
def test_vision(model, reference, grid):
    item = picture_input(grid)
    rows = torch.cat(model.encode([item])[0])
    np.testing.assert_allclose(rows[:, 0].numpy(), picture_rows(reference, item), atol=1e-5, rtol=0)


def test_all_kinds_in_one_batch(model, reference):
    """Two requests with pictures and series among each other, and one of text, computed together and in two chunks."""
    walks = [series(400, 1), series(90, 2, seed=1), series(1000, 1, seed=2)]
    media = [
        [picture_input((1, 4, 6), modality=Modality.IMAGE), series_input(walks[0], 100), picture_input((2, 4, 4))],
        [series_input(walks[1]), series_input(walks[2], 40)],
        [],
    ]
    expected_media = [
        [
            picture_rows(reference, media[0][0]),
            reference.series_rows(walks[0], 100),
            picture_rows(reference, media[0][2]),
        ],
        [reference.series_rows(walks[1]), reference.series_rows(walks[2], 40)],
        [],
    ]
    encoded = iter(model.encode([item for items in media for item in items]))
    requests, expected, first = [], [], 0
    for number, items in enumerate(expected_media):
        ids, rows, places = tokens(5, seed=number), [reference.text_rows(tokens(5, seed=number))], []
        for item in items:
            segment = torch.cat(next(encoded))
            places.append((PlaceholderRange(len(ids), len(segment)), segment))
            ids += [0] * len(item) + [7]
            rows += [item, reference.text_rows([7])]
        expected.append(reference.logits_after(np.concatenate(rows)))
        reference.forget()
        requests.append(PackedRequest(ids, torch.arange(len(ids)).expand(3, -1), blocks(first, len(ids)), places))
        first += len(requests[-1].blocks)
    together = model.forward(pack([(request, 0, len(request.token_ids)) for request in requests], 8))
    np.testing.assert_allclose(together.numpy(), expected, atol=TOLERANCE, rtol=0)
    model.forward(pack([(request, 0, 4) for request in requests], 8))
    later = model.forward(pack([(request, 4, len(request.token_ids)) for request in requests], 8))
    np.testing.assert_allclose(later.numpy(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ({"rope_scaling": FOPE | {"fope_sep_head": False}}, "fope_sep_head"),
        ({"rope_scaling": FOPE | {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"router_n_groups": 3}, "router_n_groups"),
    ],
)
def test_refuses_what_it_would_compute_wrongly(tmp_path, path, text, word):
    make_interns1_pro(tmp_path)
    config = Reference(path).config
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | text}))
    with pytest.raises(ModelLoadError, match=word):
        load(tmp_path)


def test_without_time_series(tmp_path):
    model = load(make_interns1_pro(tmp_path, with_time_series=False))
    assert len(model.encode([picture_input((1, 2, 2))])[0][0]) == 1
    with pytest.raises(ValueError, match="no time-series encoder"):
        model.encode([series_input(series(100, 1))])


def test_published_configurations_have_more_fields(tmp_path, path, model):
    """Names of code that is never run, of parts by types that Transformers does not know, and settings of training."""
    make_interns1_pro(tmp_path)
    config = Reference(path).config | {"auto_map": {"AutoConfig": "configuration_interns1_pro.InternS1ProConfig"}}
    for name in ("text_config", "vision_config", "ts_config"):
        more = {"model_type": f"interns1_pro_{name}", "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "a.B"}}
        config[name] = config[name] | more | {"use_cache": False, "attn_implementation": "flash_attention_2"}
    config["vision_config"]["deepstack_visual_indexes"] = [0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    items = [picture_input((1, 4, 4)), series_input(series(100, 1))]
    for mine, other in zip(load(tmp_path).encode(items), model.encode(items), strict=True):
        torch.testing.assert_close(mine[0], other[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 1.0)])
def test_on_a_gpu(path, reference, dtype, tolerance):
    model = load_model(EngineConfig(path, device="cuda", dtype=dtype, num_threads=2))
    model.allocate_kv_cache(8)
    samples, picture = series(700, 2), picture_input((1, 4, 6))
    encoded = [torch.cat(segments) for segments in model.encode([series_input(samples, 100), picture])]
    rows = [reference.series_rows(samples, 100), picture_rows(reference, picture)]
    ids, places = tokens(5), []
    for segment in encoded:
        places.append((PlaceholderRange(len(ids), len(segment)), segment))
        ids += [0] * len(segment)
    expected = reference.logits_after(np.concatenate([reference.text_rows(tokens(5)), *rows]))
    reference.forget()
    request = PackedRequest(ids, torch.arange(len(ids)).expand(3, -1), [2], places)
    logits = model.forward(pack([(request, 0, len(ids))], model.info.block_size, device=model.info.device))
    np.testing.assert_allclose(logits[0].cpu().numpy(), expected, atol=tolerance, rtol=0)
