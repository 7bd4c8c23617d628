"""Intern-S1-Pro with pictures, videos and time series: prompts, logits and greedy tokens equal those of a slow reference.

Transformers has no such model: the reference is :mod:`tests.models.interns1_pro_reference`, in double precision. Logits
within 1e-4 and all tokens identical, however a prompt is computed: alone, with others of other kinds, in small chunks, after
a prefix hit, after an encoder hit, after preemption.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import soundfile

from filmstrip.config import EngineConfig
from filmstrip.demo.checkpoint import make_qwen3_vl
from filmstrip.models.loader import load_model
from filmstrip.types import Modality
from tests.models.interns1_pro import IMAGE_SIZE, TS_TOKENS, VIDEO_SIZE, build_time_series_tokenizer, make_interns1_pro
from tests.models.interns1_pro_reference import Reference
from tests.parity.conftest import MAX_NEW_TOKENS, Case, build_prompts, image, user, video
from tests.parity.test_engine import check, make_engine, run

PICTURE_CASES = ["text_only", "image", "video", "two_videos", "mixed", "odd_count", "many_turns"]


@dataclass(frozen=True)
class Series:
    """A file, what it holds as float64 (num_samples, num_channels), and the rate that counts for it."""

    path: str
    samples: np.ndarray
    rate: float | None
    said: float | None

    @property
    def part(self):
        url = {"url": self.path} | ({} if self.said is None else {"sampling_rate": self.said})
        return {"type": "time_series_url", "time_series_url": url}


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Series of all formats, lengths, rates and numbers of channels."""
    folder = tmp_path_factory.mktemp("series")
    generator = np.random.default_rng(7)

    def walk(num_samples, num_channels):
        return 40 + generator.normal(size=(num_samples, num_channels)).cumsum(axis=0)

    made = {}
    arrays = {"slow": (walk(120, 2), 5.0), "fast": (walk(2500, 1), 900.0), "no_rate": (walk(333, 3), None)}
    for name, (samples, rate) in arrays.items():
        np.save(folder / f"{name}.npy", samples)
        made[name] = Series(str(folder / f"{name}.npy"), samples.astype(np.float32), rate, rate)
    table = walk(61, 1)
    np.savetxt(folder / "table.csv", table, delimiter=",", header="value", comments="")
    made["table"] = Series(str(folder / "table.csv"), table.astype(np.float32), 50.0, 50.0)
    times = np.arange(4000) / 8000
    soundfile.write(folder / "sound.wav", np.sin(2 * np.pi * 440 * times) * times, 8000, subtype="FLOAT")
    sound, _ = soundfile.read(folder / "sound.wav", always_2d=True)
    made["sound"] = Series(str(folder / "sound.wav"), sound, 8000.0, None)
    return made


@pytest.fixture(scope="module")
def conversations(cases, media_files, series):
    """Each with the series in it, in order."""
    m, s = media_files, series
    every = [s["slow"], s["fast"], s["sound"]]
    turns = [
        user("This was measured: ", s["table"].part, "What is it?"),
        {"role": "assistant", "content": "A walk."},
        user("And this ", image(m["small"]), s["no_rate"].part, " or <this>?"),
    ]
    mixed = [
        user(s["slow"].part, image(m["photo"]), s["fast"].part, video(m["other"]), "and", s["sound"].part, "Compare.")
    ]
    return {name: (cases[name], []) for name in ("text_only", "image", "video", "mixed")} | {
        "series": (Case("series", [user(s["slow"].part, "What happens?")]), [s["slow"]]),
        "other_question": (Case("other", [user(s["slow"].part, "What is its mean? Say it in words.")]), [s["slow"]]),
        "two_series": (Case("two", [user("A", s["fast"].part, "B", s["table"].part, "?")]), [s["fast"], s["table"]]),
        "all_kinds": (Case("all", mixed), every),
        "turns": (Case("turns", turns), [s["table"], s["no_rate"]]),
        "without_rate": (Case("without_rate", [user(s["no_rate"].part)]), [s["no_rate"]]),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_interns1_pro(tmp_path_factory.mktemp("interns1_pro"))


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2, block_size=8))


@pytest.fixture(scope="module")
def asked(conversations, path):
    return build_prompts({name: case for name, (case, _) in conversations.items()}, path)


def answer(reference, prompt, series):
    """Greedy tokens and their logits, in the form that ``check`` takes."""
    rows = reference.text_rows(np.asarray(prompt.token_ids))
    given = iter(series)
    for feature in prompt.features:
        if feature.modality is Modality.TIME_SERIES:
            one = next(given)
            embeddings = reference.series_rows(one.samples, one.rate)
        else:
            pixels = (feature.patches.array / 255 - 0.5) / 0.5
            embeddings = reference.picture_rows(pixels, feature.grid_thw)
        for part, segment in zip(np.split(embeddings, len(feature.segments)), feature.segments, strict=True):
            rows[segment.offset : segment.end] = part
    tokens, logits = [], []
    reference.forget()
    for _ in range(MAX_NEW_TOKENS):
        logits.append(reference.logits_after(rows))
        tokens.append(int(logits[-1].argmax()))
        rows = reference.text_rows(tokens[-1:])
    return {"new_token_ids": np.array(tokens), "logits": np.stack(logits)}


@pytest.fixture(scope="module")
def expected(conversations, asked, path):
    reference = Reference(path)
    return {name: answer(reference, asked[name], series) for name, (_, series) in conversations.items()}


def test_answers_are_not_trivial(expected):
    answers = {tuple(reference["new_token_ids"].tolist()) for reference in expected.values()}
    assert len(answers) >= len(expected) - 1
    assert all(len(set(answer)) > 4 for answer in answers)


def test_pictures_are_shown_as_qwen3_vl_shows_them(cases, path, tmp_path):
    """Tokens and pixels; those of Qwen3-VL are held to Transformers' processors elsewhere."""
    few = {name: cases[name] for name in PICTURE_CASES}
    theirs = build_prompts(few, str(make_qwen3_vl(tmp_path, image_size=IMAGE_SIZE, video_size=VIDEO_SIZE)))
    for name, prompt in build_prompts(few, path).items():
        assert prompt.token_ids == theirs[name].token_ids
        assert (prompt.positions, prompt.position_delta) == (None, 0)
        for mine, other in zip(prompt.features, theirs[name].features, strict=True):
            assert np.array_equal(mine.patches.array, other.patches.array)
            assert (mine.grid_thw, mine.segments, mine.normalization) == (
                other.grid_thw,
                other.segments,
                other.normalization,
            )


def test_prompts_with_time_series(asked, conversations, path):
    """Each series stands between its own start and end, with as many tokens as the reference has embeddings."""
    reference = Reference(path)
    pad, start, end = build_time_series_tokenizer().convert_tokens_to_ids(list(TS_TOKENS.values()))
    for name, (_, series) in conversations.items():
        prompt = asked[name]
        found = [feature for feature in prompt.features if feature.modality is Modality.TIME_SERIES]
        records = [record for record in prompt.media if record.type == "time_series"]
        for feature, record, one in zip(found, records, series, strict=True):
            (segment,) = feature.segments
            ids = prompt.token_ids[segment.offset - 1 : segment.end + 1]
            assert ids == [start, *[pad] * len(reference.series_rows(one.samples, one.rate)), end]
            assert (record.num_samples, record.num_channels) == one.samples.shape
            assert (record.num_tokens, record.num_frames) == (segment.length, 0)
            scaled = (one.samples - one.samples.mean(axis=0)) / (one.samples.std(axis=0) + 1e-8)
            np.testing.assert_allclose(feature.patches.array, scaled, atol=1e-5, rtol=0)
            assert any("sampling_rate" in note for note in record.notes) == (one.rate is None)


def test_alone(model, asked, expected):
    for name, prompt in asked.items():
        check(run(make_engine(model), {name: prompt})[name], expected[name])


def test_in_a_batch(model, asked, expected):
    results = run(make_engine(model), asked)
    for name, result in results.items():
        check(result, expected[name])


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked(model, asked, expected, chunk):
    names = ["all_kinds", "two_series", "turns", "text_only"]
    results = run(make_engine(model, max_num_batched_tokens=chunk, prefix=False), {name: asked[name] for name in names})
    for name in names:
        check(results[name], expected[name])


def test_after_a_prefix_hit(model, asked, expected):
    """The same again, and another question about a series that the cache knows."""
    engine = make_engine(model)
    names = ["series", "all_kinds", "turns"]
    run(engine, {name: asked[name] for name in names})
    block = engine.model.info.block_size
    for name in [*names, "other_question"]:
        before = engine.stats()["prefix_cache_hit_tokens"]
        check(run(engine, {name: asked[name]})[name], expected[name])
        hit = engine.stats()["prefix_cache_hit_tokens"] - before
        alike = len(asked[name].token_ids) - 1 if name in names else asked[name].features[0].segments[0].end
        assert hit >= alike // block * block, name


def test_after_an_encoder_hit(model, asked, expected):
    engine = make_engine(model, prefix=False)
    names = ["series", "all_kinds", "two_series"]
    for name in names:
        run(engine, {name: asked[name]})
    encoded = engine.stats()["encoded_segments"]
    for name in [*names, "other_question"]:
        check(run(engine, {name: asked[name]})[name], expected[name])
    assert engine.stats()["encoded_segments"] == encoded


def test_with_an_encoder_cache_smaller_than_a_series(model, asked, expected):
    engine = make_engine(model, encoder_bytes=1, max_num_batched_tokens=50)
    check(run(engine, {"all_kinds": asked["all_kinds"]})["all_kinds"], expected["all_kinds"])


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    names = ["all_kinds", "two_series", "video", "series", "text_only"]
    num_tokens = sum(len(asked[name].token_ids) for name in names) + 6 * model.info.block_size
    engine = make_engine(model, num_tokens=num_tokens, prefix=prefix, max_num_batched_tokens=256)
    results = run(engine, {name: asked[name] for name in names})
    assert engine.stats()["num_preemptions"] > 0
    for name in names:
        check(results[name], expected[name])
