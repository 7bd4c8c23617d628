"""How much of a time series is shown, in which windows, in whose place: Intern-S1-Pro's processor."""

import asyncio
import json
import logging

import numpy as np
import pytest

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig
from filmstrip.errors import ContextLengthError, InvalidRequestError, MediaError
from filmstrip.models.interns1_pro_time_series import count_windows
from filmstrip.processing.interns1_pro import MAX_SAMPLES, window_hop
from filmstrip.processing.prompt_builder import PromptBuilder
from filmstrip.types import Modality, TimeSeriesMetadata
from tests.models.interns1_pro import build_time_series_tokenizer, make_interns1_pro
from tests.models.interns1_pro_reference import hop_of
from tests.parity.clips import make_clip

TS_PAD = build_time_series_tokenizer().convert_tokens_to_ids("<TS_CONTEXT>")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_interns1_pro(tmp_path_factory.mktemp("interns1_pro"))


@pytest.fixture(scope="module")
def processor(path):
    return PromptBuilder(LLMConfig(EngineConfig(path)))._processor


def copy_of(path, folder, **files):
    """The checkpoint's small files, some of them replaced."""
    made = make_interns1_pro(folder)
    for name, change in files.items():
        file = folder / f"{name}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(change(old)))
    return made


def build(path, messages, *, max_model_len=4096, **options):
    async def run():
        builder = PromptBuilder(LLMConfig(EngineConfig(path), MediaConfig(num_decode_threads=2)))
        try:
            return await builder.build(messages, max_model_len=max_model_len, report=lambda _: None, **options)
        finally:
            await builder.close()

    return asyncio.run(run())


def series(samples, **settings):
    return {"type": "time_series", "time_series": np.asarray(samples), **settings}


def user(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def test_windows_as_the_reference_counts_them(processor):
    generator = np.random.default_rng(0)
    rates = np.concatenate([10 ** generator.uniform(-3, 6, 300), np.arange(1600, 3800, 50), [1, 100, 8000]])
    for rate in rates.tolist():
        hop = window_hop(rate)
        assert hop == hop_of(rate)
        assert 2 <= hop <= 160
        for num_samples in generator.integers(2 * hop + 1, 100_000, 3).tolist():
            plan = processor.plan_time_series(TimeSeriesMetadata(num_samples, 2, rate))
            windows = int(np.ceil((num_samples - 2 * hop) / hop)) + 1
            assert (plan.num_samples, plan.num_channels, plan.hop) == (num_samples, 2, hop)
            assert count_windows(num_samples, hop) == windows
            steps = windows // 2
            assert plan.num_tokens == len(range(0, steps, 2))  # a convolution of stride 2 takes every other


def test_sampling_rates():
    assert [window_hop(rate) for rate in (1e-9, 100, 1e9)] == [2, 24, 160]


def test_every_series_of_five_samples_has_a_window(processor):
    """Without a rate: a quarter of the number of samples."""
    for num_samples in range(1, 3000):
        metadata = TimeSeriesMetadata(num_samples, 1)
        if num_samples < 5:
            with pytest.raises(MediaError, match="at least 5"):
                processor.plan_time_series(metadata)
        else:
            assert processor.plan_time_series(metadata).num_tokens >= 1


def test_normalised(processor):
    generator = np.random.default_rng(1)
    samples = generator.normal(size=(70_001, 5)).astype(np.float32) * [1e-3, 1, 1e6, 0, 0] + [0, -5, 1e7, 0, 3e38]
    samples = samples.astype(np.float32)
    out = np.full((50_000, 5), np.nan, np.float32)
    processor.normalize_time_series(samples, out)
    exact = samples.astype(np.float64)
    expected = (exact - exact.mean(axis=0)) / (exact.std(axis=0) + 1e-8)
    np.testing.assert_allclose(out[:, :3], expected[:50_000, :3], atol=1e-5)
    assert np.array_equal(out[:, 3], np.zeros(50_000))
    assert np.isfinite(out).all()


def test_only_the_beginning_of_a_long_series_is_shown(path):
    samples = np.random.default_rng(2).normal(size=MAX_SAMPLES + 1000) + np.linspace(0, 3, MAX_SAMPLES + 1000)
    prompt = build(path, user(series(samples, sampling_rate=1e5)))
    (feature,), (record,) = prompt.features, prompt.media
    assert feature.patches.shape == (MAX_SAMPLES, 1)
    expected = (samples - samples.mean()) / samples.std()
    np.testing.assert_allclose(feature.patches.array[:, 0], expected[:MAX_SAMPLES], atol=1e-5)
    assert (record.num_samples, record.notes) == (
        MAX_SAMPLES,
        [f"only the first {MAX_SAMPLES} of {MAX_SAMPLES + 1000} samples are looked at"],
    )


def test_what_people_type_is_text(path):
    typed = "<|ts|><TS_CONTEXT><|/ts|>"
    prompt = build(path, user(typed, series(np.arange(50.0)), typed))
    (feature,) = prompt.features
    (segment,) = feature.segments
    assert prompt.token_ids.count(TS_PAD) == segment.length


def test_a_template_that_leaves_a_series_out(path, tmp_path):
    silent = copy_of(path, tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|ts|><TS_CONTEXT><|/ts|>", ""))
    with pytest.raises(InvalidRequestError, match="shows 0 time series, the messages have 1"):
        build(silent, user(series(np.arange(50.0))))


@pytest.mark.parametrize(
    "files",
    [
        {"config": lambda old: old | {"ts_token_id": TS_PAD}, "tokenizer_config": lambda old: _without_roles(old)},
        {
            "processor_config": lambda old: {"ts_token": "<TS_CONTEXT>"},
            "tokenizer_config": lambda old: _without_roles(old),
        },
        {"tokenizer_config": lambda old: _without_roles(old)},
    ],
    ids=["config", "processor_config", "name"],
)
def test_the_token_as_the_files_say(path, tmp_path, files):
    prompt = build(copy_of(path, tmp_path, **files), user(series(np.arange(50.0))))
    assert prompt.token_ids.count(TS_PAD) == prompt.features[0].segments[0].length > 0


def _without_roles(settings):
    return settings | {"extra_special_tokens": list(settings["extra_special_tokens"].values())}


@pytest.mark.parametrize(
    "change",
    [
        lambda old: {key: value for key, value in old.items() if key != "ts_config"},
        lambda old: old | {"ts_config": None},
        lambda old: old | {"ts_token_id": 99_999},
    ],
    ids=["no_encoder", "null", "no_such_token"],
)
def test_checkpoints_that_take_no_time_series(path, tmp_path, change, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(InvalidRequestError, match="takes no time_series_url"):
        build(copy_of(path, tmp_path, config=change), user(series(np.arange(50.0))))
    has_encoder = change({"ts_config": {}}).get("ts_config") is not None
    assert ("no control token for time series" in caplog.text) == has_encoder


def test_pictures_make_room_for_a_series(path, tmp_path):
    """What does not fit is shown smaller; a series never is."""
    clip = make_clip(tmp_path / "clip.mp4", 90, 192, 128, rate=30)
    parts = user(series(np.sin(np.arange(400.0)), sampling_rate=10), {"type": "video", "video": str(clip)})
    whole = build(path, parts)
    limit = len(whole.token_ids) - 10
    with pytest.raises(ContextLengthError, match=r"frames would fit"):
        build(path, parts, max_model_len=limit)
    fitted = build(path, parts, max_model_len=limit, media_overflow="fit")
    assert len(fitted.token_ids) < limit
    before, after = ({feature.modality: feature for feature in prompt.features} for prompt in (whole, fitted))
    assert after[Modality.VIDEO].patches.shape[0] < before[Modality.VIDEO].patches.shape[0]
    mine, theirs = (each[Modality.TIME_SERIES].segments[0].length for each in (after, before))
    assert mine == theirs > 0
    assert [len(record.notes) for record in fitted.media] == [0, 1]


def test_rates_and_values_make_other_content(path):
    """The encoder cache and the prefix cache go by the hash."""
    samples = np.random.default_rng(4).normal(size=300)

    def media_hash(values, rate):
        return build(path, user(series(values, sampling_rate=rate))).features[0].media_hash

    assert media_hash(samples, 100) == media_hash(samples, 100)
    assert len({media_hash(samples, 100), media_hash(samples, 40), media_hash(samples + np.eye(1, 300)[0], 100)}) == 3
