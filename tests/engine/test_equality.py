"""An answer does not depend on how it was computed: batched, chunked, from caches, after preemption (R10)."""

import pytest

from filmstrip.types import SamplingParams
from tests.engine.helpers import alone, drain, fake_of, greedy, make_engine, run, step
from tests.fakes import PLACEHOLDER_ID, FakeModel, feature, prompt

PROMPTS = {
    "text": prompt(41, seed=1),
    "plain_positions": prompt(30, seed=2, mrope=False),
    "video": prompt(40, feature(5, num_segments=6, length=4, content=1), seed=3),
    "image": prompt(20, feature(3, num_segments=1, length=11, content=2, modality="image"), seed=4),
    "mixed": prompt(
        60,
        feature(2, num_segments=1, length=7, content=3, modality="image"),
        feature(12, num_segments=4, length=5, content=4),
        feature(40, num_segments=2, length=6, content=5),
        seed=5,
    ),
    "one_token": prompt(1, seed=6),
    "whole_blocks": prompt(32, seed=7),
    "media_last": prompt(20, feature(8, num_segments=3, length=4, gap=0, content=6), seed=8),
}
ALONE = {name: alone(each) for name, each in PROMPTS.items()}


def test_the_fake_is_sensitive():
    assert len({tuple(tokens) for tokens in ALONE.values()}) == len(ALONE)
    assert all(len(set(tokens)) > 3 for tokens in ALONE.values())


@pytest.mark.parametrize("prefix", [True, False])
def test_batched(prefix):
    assert run(make_engine(prefix=prefix), PROMPTS) == ALONE


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("prefix", [True, False])
def test_chunked(budget, prefix):
    assert run(make_engine(prefix=prefix, max_num_batched_tokens=budget), PROMPTS) == ALONE


@pytest.mark.parametrize("budget", [5, 512])
def test_after_a_prefix_hit(budget):
    engine = make_engine(max_num_batched_tokens=budget)
    run(engine, PROMPTS)
    before = engine.stats()["prefix_cache_hit_tokens"]
    assert run(engine, PROMPTS) == ALONE
    expected = sum((len(each.token_ids) - 1) // 4 * 4 for each in PROMPTS.values())
    assert engine.stats()["prefix_cache_hit_tokens"] - before == expected


def test_the_answer_is_a_prefix_too():
    engine = make_engine()
    first = PROMPTS["video"]
    answer = run(engine, {"first": first})["first"]
    turn = prompt(60, *first.features, seed=3)
    turn.token_ids[40:48] = answer
    before = engine.stats()["prefix_cache_hit_tokens"]
    assert run(engine, {"second": turn})["second"] == alone(turn)
    # The last token of the answer was never computed, so the block it would fill is not there.
    assert engine.stats()["prefix_cache_hit_tokens"] - before == 44


def test_after_an_encoder_hit():
    engine = make_engine(prefix=False)
    run(engine, PROMPTS)
    encoded = engine.stats()["encoded_segments"]
    assert encoded == sum(len(f.segments) for each in PROMPTS.values() for f in each.features)
    assert run(engine, PROMPTS) == ALONE
    assert engine.stats()["encoded_segments"] == encoded
    assert engine.stats()["prefix_cache_hit_tokens"] == 0


@pytest.mark.parametrize("encoder_cache_bytes", [0, 100, 400])
def test_with_a_tiny_encoder_cache(encoder_cache_bytes):
    engine = make_engine(encoder_cache_bytes=encoder_cache_bytes, max_num_batched_tokens=9)
    assert run(engine, PROMPTS) == ALONE
    assert engine.stats()["encoder_cache_bytes"] <= encoder_cache_bytes


@pytest.mark.parametrize("num_blocks", [17, 19, 23, 30])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("budget", [6, 64])
def test_after_preemption(num_blocks, prefix, budget):
    engine = make_engine(num_blocks=num_blocks, max_model_len=68, prefix=prefix, max_num_batched_tokens=budget)
    assert run(engine, PROMPTS) == ALONE


def test_preemption_happens_where_blocks_run_out():
    engine = make_engine(num_blocks=20, max_model_len=80, prefix=False)
    prompts = {str(seed): prompt(12, seed=seed) for seed in range(4)}
    assert run(engine, prompts, greedy(30)) == {name: alone(each, greedy(30)) for name, each in prompts.items()}
    assert engine.stats()["num_preemptions"] > 0


def test_sampled_answers_do_not_depend_on_the_batch():
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=11)
    reference = {name: alone(each, params) for name, each in PROMPTS.items()}
    assert run(make_engine(), PROMPTS, params) == reference
    assert run(make_engine(max_num_batched_tokens=5), PROMPTS, params) == reference
    small = make_engine(num_blocks=18, max_model_len=72, prefix=False)
    assert run(small, PROMPTS, params) == reference


def test_same_placeholders_other_media_share_nothing():
    """Token ids are equal; only the media hash tells the prompts apart."""
    one, other = (prompt(40, feature(4, num_segments=5, length=4, content=c), seed=9) for c in (20, 21))
    assert one.token_ids == other.token_ids
    engine = make_engine()
    answers = run(engine, {"one": one, "other": other})
    assert answers == {"one": alone(one), "other": alone(other)}
    assert answers["one"] != answers["other"]
    again = make_engine()
    run(again, {"one": one})
    assert run(again, {"other": other})["other"] == answers["other"]
    assert again.stats()["prefix_cache_hit_tokens"] == 4  # the text before the video


def test_only_the_second_of_two_videos_differs():
    def two(content):
        first, second = feature(4, num_segments=2, length=4, content=30), feature(20, num_segments=2, content=content)
        return prompt(40, first, second, seed=10)

    engine = make_engine()
    run(engine, {"a": two(31)})
    assert run(engine, {"b": two(32)})["b"] == alone(two(32))
    assert engine.stats()["prefix_cache_hit_tokens"] == 20


def test_the_same_media_as_image_and_as_video_is_not_the_same():
    one, other = (
        prompt(20, feature(4, num_segments=1, length=8, content=40, modality=modality), seed=11)
        for modality in ("image", "video")
    )
    engine = make_engine()
    run(engine, {"one": one})
    run(engine, {"other": other})
    assert engine.stats()["prefix_cache_hit_tokens"] == 4
    assert engine.stats()["encoded_segments"] == 2


def test_same_media_at_different_offsets():
    prompts = {
        str(offset): prompt(40, feature(offset, num_segments=4, length=4, content=50), seed=12) for offset in range(9)
    }
    engine = make_engine()
    for name, each in prompts.items():
        assert run(engine, {name: each}) == {name: alone(each)}
    assert engine.stats()["encoded_segments"] == 4  # found by content, wherever it stands


def test_one_media_item_twice_in_a_prompt():
    twice = prompt(50, feature(3, content=60), feature(25, content=60), seed=13)
    engine = make_engine()
    assert run(engine, {"twice": twice})["twice"] == alone(twice)
    assert engine.stats()["encoded_segments"] == 3


def test_typed_placeholders_do_not_hide_where_media_begin():
    """Token ids are equal, blocks too: the user typed one placeholder before the image, or one after it."""
    image = {"num_segments": 1, "length": 6, "content": 70, "modality": "image"}
    early, late = (prompt(24, feature(offset, **image), seed=14, mrope=False) for offset in (1, 0))
    early.token_ids[:7] = late.token_ids[:7] = [PLACEHOLDER_ID] * 7
    engine = make_engine(model=FakeModel(block_size=8))
    run(engine, {"early": early})
    assert run(engine, {"late": late})["late"] == alone(late)
    assert engine.stats()["prefix_cache_hit_tokens"] == 0


def test_penalties_see_prompt_and_answer():
    """So strong a penalty that nothing comes twice; without it much does."""
    text = PROMPTS["plain_positions"]
    plain = run(make_engine(), {"a": text}, greedy(40))["a"]
    assert len(set(plain)) < 40
    answer = run(make_engine(), {"a": text}, greedy(40, repetition_penalty=100.0))["a"]
    assert len(set(answer)) == 40
    assert not set(answer) & set(text.token_ids)
    counted = run(make_engine(), {"a": text}, greedy(40, frequency_penalty=2.0, presence_penalty=2.0))["a"]
    assert len(set(counted)) > len(set(plain))


def test_two_identical_prompts_at_once():
    """Both compute; the second publication keeps the first one's blocks, and any order of freeing is fine."""
    for longer in ("a", "b"):
        engine = make_engine()
        for name in ("a", "b"):
            engine.add_request(name, PROMPTS["mixed"], greedy(12 if name == longer else 4))
        answers = drain(engine)
        assert answers[longer][:4] == answers["b" if longer == "a" else "a"] == ALONE["mixed"][:4]
        assert run(engine, {"c": PROMPTS["mixed"]})["c"] == ALONE["mixed"]
        assert engine.stats()["prefix_cache_hit_tokens"] == 56


def test_a_prompt_that_arrives_while_its_twin_decodes_shares_blocks():
    engine = make_engine()
    engine.add_request("a", PROMPTS["mixed"], greedy(20))
    step(engine)
    allocated = engine.stats()["num_allocated_blocks"]
    engine.add_request("b", PROMPTS["mixed"], greedy(20))
    step(engine)
    assert engine.stats()["num_allocated_blocks"] == allocated + 2
    assert fake_of(engine).forwards[-1] == [1, 4]
    answers = drain(engine)
    assert answers["a"] == answers["b"][1:] or answers["b"][:8] == ALONE["mixed"]
