"""Media that tokens attend to beside the prompt: at hand in every step, held while they are needed, never more than fit."""

import random

import pytest

from filmstrip.engine.encoder_cache import EncoderCache
from filmstrip.errors import InvalidRequestError
from filmstrip.models.mllama import seen_media
from tests.engine.attending_fake import SEGMENT_BYTES, make_attending_engine, picture
from tests.engine.helpers import drain, fake_of, greedy, run, step
from tests.fakes import prompt

PROMPTS = {
    "text": prompt(20, seed=1, mrope=False),
    "one": prompt(30, picture(9, 1), seed=1, mrope=False),
    "other": prompt(30, picture(9, 2), seed=1, mrope=False),
    "first": prompt(12, picture(0, 1), seed=2, mrope=False),
    "last": prompt(12, picture(11, 3), seed=2, mrope=False),
    "turns": prompt(50, picture(9, 1), picture(31, 2), seed=1, mrope=False),
    "neighbours": prompt(40, picture(6, 3), picture(7, 1), picture(8, 2), picture(30, 3), seed=3, mrope=False),
}


def alone(each, params=None):
    return run(make_attending_engine(prefix=False), {"alone": each}, params)["alone"]


@pytest.fixture(scope="module")
def answers():
    found = {name: alone(each) for name, each in PROMPTS.items()}
    assert len(set(map(tuple, found.values()))) == len(PROMPTS)
    return found


@pytest.mark.parametrize(
    ("offsets", "start", "end", "seen"),
    [
        ([], 0, 9, range(0)),
        ([4], 0, 1, range(1)),
        ([4, 7], 3, 4, range(2)),
        ([4, 7], 3, 9, range(2)),
        ([4, 7], 4, 7, range(1)),
        ([4, 7], 6, 8, range(2)),
        ([4, 7], 7, 99, range(1, 2)),
        ([4, 5, 6], 4, 5, range(1)),
        ([4, 5, 6], 5, 6, range(2)),
        ([4, 5, 6], 6, 7, range(3)),
        ([4, 5, 6], 90, 99, range(3)),
        ([0, 4, 5, 8, 9], 6, 7, range(1, 3)),
        ([0, 4, 5, 8, 9], 6, 9, range(1, 4)),
        ([0, 4, 5, 8, 9], 2, 5, range(2)),
    ],
)
def test_who_sees_what(offsets, start, end, seen):
    assert seen_media(offsets, start, end) == seen


def test_of_many_tokens_is_what_each_of_them_sees():
    rng = random.Random(5)
    for _ in range(500):
        offsets = sorted(rng.sample(range(12), rng.randrange(1, 6)))
        start = rng.randrange(14)
        end = rng.randrange(start + 1, 16)
        each = set().union(*(seen_media(offsets, token, token + 1) for token in range(start, end)))
        assert sorted(each) == list(seen_media(offsets, start, end))


@pytest.mark.parametrize("budget", [1, 3, 7, 512])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("room", [3, 100])
def test_together_in_chunks_of_any_size(answers, budget, prefix, room):
    engine = make_attending_engine(max_num_batched_tokens=budget, prefix=prefix, room=room)
    assert run(engine, PROMPTS) == answers
    assert run(engine, PROMPTS) == answers


@pytest.mark.parametrize("num_blocks", [30, 40])
def test_after_preemption(answers, num_blocks):
    engine = make_attending_engine(num_blocks=num_blocks, max_model_len=100, room=3)
    many = {f"{name}{number}": each for number in range(3) for name, each in PROMPTS.items()}
    params = greedy(20)
    expected = {name: alone(each, params) for name, each in PROMPTS.items()}
    tokens = run(engine, many, params)
    assert engine.stats()["num_preemptions"] > 0
    assert tokens == {name: expected[name[:-1]] for name in many}
    assert all(tokens[f"{name}0"][:8] == answers[name] for name in PROMPTS)


def test_media_are_held_to_the_end_of_the_answer():
    """With room for one picture each is encoded once, though the answers take many steps: the second waits."""
    engine = make_attending_engine(room=1, prefix=False)
    assert run(engine, {name: PROMPTS[name] for name in ("one", "other", "first")}, greedy(20)).keys() == {
        "one",
        "other",
        "first",
    }
    assert fake_of(engine).num_encoded_segments == 3
    assert max(len(each) for each in fake_of(engine).forwards) == 1


def test_requests_with_the_same_media_hold_them_together():
    engine = make_attending_engine(room=1, prefix=False)
    run(engine, {"one": PROMPTS["one"], "first": PROMPTS["first"]}, greedy(20))
    assert fake_of(engine).num_encoded_segments == 1
    assert max(len(each) for each in fake_of(engine).forwards) == 2


def test_a_request_without_media_needs_no_room():
    engine = make_attending_engine(room=0, prefix=False)
    assert run(engine, {"text": PROMPTS["text"]})["text"] == alone(PROMPTS["text"])


def test_media_that_never_fit_are_refused():
    engine = make_attending_engine(room=2)
    with pytest.raises(
        InvalidRequestError, match=r"3 different media .* 144 bytes .* holds 96: raise --encoder-cache-gb"
    ):
        engine.add_request("too many", PROMPTS["neighbours"], greedy())
    assert not engine.has_work
    engine.add_request("turns", PROMPTS["turns"], greedy())
    drain(engine)


def test_nothing_is_held_for_who_is_gone():
    engine = make_attending_engine(room=2)
    engine.add_request("gone", PROMPTS["turns"], greedy(50))
    engine.add_request("waits", PROMPTS["last"], greedy(4))
    step(engine)
    step(engine)
    assert engine.stats()["num_waiting"] == 1
    engine.abort("gone")
    engine.check_integrity()
    assert drain(engine).keys() == {"waits"}


def test_a_picture_that_cannot_be_encoded_fails_its_request_only(answers):
    engine = make_attending_engine()
    fake_of(engine).fail_on_patches = bytes([2])
    for name in ("one", "other", "text"):
        engine.add_request(name, PROMPTS[name], greedy())
    outputs = {output.request_id: output for output in step(engine)}
    assert "could not be encoded" in (outputs["other"].error or "")
    assert drain(engine).keys() == {"one", "text"}


def test_the_prefix_cache_knows_what_tokens_see(answers):
    """Tokens 0 to 8 of these prompts are the same, and in blocks of their own; what they see is not."""
    engine = make_attending_engine()
    hits = 0
    for name, num_shared in (("one", 0), ("other", 0), ("text", 0), ("turns", 0), ("one", 28), ("turns", 48)):
        assert run(engine, {name: PROMPTS[name]})[name] == answers[name]
        assert engine.stats()["prefix_cache_hit_tokens"] - hits == num_shared
        hits = engine.stats()["prefix_cache_hit_tokens"]
    question = prompt(34, picture(9, 1), seed=1, mrope=False)
    question.token_ids[20:] = [5] * 14
    assert run(engine, {"question": question})["question"] == alone(question)
    assert engine.stats()["prefix_cache_hit_tokens"] - hits == 20


def test_a_cache_keeps_what_is_held_and_counts_it():
    cache = EncoderCache(100, bytes_per_held_segment=40)
    assert cache.can_hold(())
    assert cache.can_hold([("a", 0), ("b", 0)])
    assert not cache.can_hold([("a", 0), ("b", 0), ("c", 0)])
    cache.hold([("a", 0)])
    cache.hold([("a", 0), ("b", 0)])
    assert cache.can_hold([("b", 0)])
    assert not cache.can_hold([("c", 0)])
    cache.let_go([("a", 0), ("b", 0)])
    assert cache.can_hold([("c", 0)])
    cache.check_integrity([[("a", 0)]])
    assert SEGMENT_BYTES == 48


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_and_aborts(answers, seed):
    """Over pools too small for all, of blocks and of room for media: whoever is answered is answered right."""
    rng = random.Random(seed)
    room, num_blocks = rng.choice([3, 4, 100]), rng.choice([17, 30, 256])
    engine = make_attending_engine(
        room=room,
        num_blocks=num_blocks,
        max_model_len=64,
        max_num_seqs=rng.choice([1, 3, 16]),
        max_num_batched_tokens=rng.choice([1, 5, 64]),
        prefix=rng.random() < 0.8,
    )
    asked: dict[str, str] = {}
    found: dict[str, list[int]] = {}
    for number in range(200):
        if rng.random() < 0.3:
            name = f"r{number}"
            asked[name], found[name] = rng.choice(sorted(PROMPTS)), []
            engine.add_request(name, PROMPTS[asked[name]], greedy())
        if found and rng.random() < 0.05:
            gone = rng.choice(sorted(found))
            engine.abort(gone)
            del found[gone]
        for output in step(engine):
            if output.request_id in found:
                found[output.request_id] += output.new_token_ids
    for name, tokens in drain(engine).items():
        found[name] += tokens
    assert len(found) > 20
    assert all(tokens == answers[asked[name]] for name, tokens in found.items())
