"""The engine on a fake model: the same tokens however a prompt is computed, and every block accounted for after every step."""

import random

import pytest

from filmstrip.engine.engine import Engine, EngineLimits
from filmstrip.errors import ContextLengthError, InvalidRequestError
from filmstrip.types import SamplingParams
from tests.fakes import FakeModel, prompt

EOS = (3,)


def make(model=None, *, blocks=200, seqs=16, batched=64, encoder_bytes=1 << 20, prefix=True, max_len=600):
    limits = EngineLimits(
        num_blocks=blocks,
        max_model_len=max_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        encoder_cache_bytes=encoder_bytes,
        enable_prefix_caching=prefix,
    )
    return Engine(model or FakeModel(), limits)


def greedy(max_tokens=12, **settings):
    return SamplingParams(max_tokens=max_tokens, temperature=0, **settings)


def run(engine, requests, params=None):
    """Tokens of each request, all added at once; integrity is checked after every step."""
    tokens = {name: [] for name in requests}
    for name, request in requests.items():
        engine.add_request(name, request, params or greedy(), EOS)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.new_token_ids
        engine.check_integrity()
    assert engine.stats()["num_allocated_blocks"] == 0
    return tokens


def requests():
    rng = random.Random(1)
    text = [rng.randrange(80) for _ in range(50)]
    return {
        "text": prompt(text[:23]),
        "one token": prompt([5]),
        "video": prompt(text[:6], (1, 4), text[6:11]),
        "two videos": prompt((2, 2), text[:9], (1, 3), text[9:10]),
        "same start": prompt(text[:6], (1, 4), text[20:41]),
        "other pixels": prompt(text[:6], (9, 4), text[6:11]),
        "media last": prompt(text[:3], (5, 1)),
    }


@pytest.fixture(scope="module")
def alone():
    return {name: run(make(prefix=False, batched=1000), {name: request})[name] for name, request in requests().items()}


def test_answers_depend_on_everything(alone):
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)


@pytest.mark.parametrize("batched", [1, 3, 7, 16, 1000])
@pytest.mark.parametrize("prefix", [False, True])
def test_batched_and_chunked(alone, batched, prefix):
    assert run(make(batched=batched, prefix=prefix), requests()) == alone


@pytest.mark.parametrize("blocks", [19, 24, 40])
@pytest.mark.parametrize("prefix", [False, True])
def test_preempted(alone, blocks, prefix):
    engine = make(blocks=blocks, prefix=prefix, max_len=blocks * 4)
    assert run(engine, requests()) == alone
    if blocks < 30:
        assert engine.stats()["num_preemptions"] > 0


def test_a_prefix_hit_computes_only_the_rest(alone):
    model = FakeModel()
    engine = make(model)
    assert run(engine, requests()) == alone
    for name, request in requests().items():
        computed, encoded = model.num_forward_tokens, len(model.encoded)
        assert run(engine, {name: request}) == {name: alone[name]}
        num_cached = (len(request.token_ids) - 1) // 4 * 4
        decoded = len(alone[name]) - 1
        assert model.num_forward_tokens - computed == len(request.token_ids) - num_cached + decoded
        if name != "media last":
            assert len(model.encoded) == encoded


def test_cached_tokens_are_reported():
    engine = make()
    request = requests()["video"]
    run(engine, {"first": request})
    engine.add_request("second", request, greedy(1))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [output.num_cached_tokens for output in outputs] == [(len(request.token_ids) - 1) // 4 * 4]


def test_the_same_placeholders_with_other_pixels_share_nothing_behind_them(alone):
    engine = make()
    run(engine, {"video": requests()["video"]})
    hit = engine.stats()["prefix_cache_hit_tokens"]
    assert run(engine, {"other pixels": requests()["other pixels"]}) == {"other pixels": alone["other pixels"]}
    # Text before the first placeholder is the same, the block that holds it is not.
    assert engine.stats()["prefix_cache_hit_tokens"] - hit == 4


def test_the_encoder_runs_once_per_picture(alone):
    model = FakeModel()
    engine = make(model, prefix=False)
    assert run(engine, requests()) == alone
    assert len(model.encoded) == len(set(model.encoded)) == 4 + 2 + 4 + 1  # of 4 items; "1" is in three requests
    assert run(engine, requests()) == alone
    assert len(model.encoded) == 11


@pytest.mark.parametrize("encoder_bytes", [0, 8 * 2 * 4 * 8, 3 * 8 * 2 * 4 * 8])
def test_a_small_encoder_cache_only_costs_time(alone, encoder_bytes):
    engine = make(encoder_bytes=encoder_bytes, batched=10)
    assert run(engine, requests()) == alone
    assert engine.stats()["encoder_cache_bytes"] <= encoder_bytes


def test_generated_tokens_are_found_by_the_next_turn():
    engine = make()
    first = prompt([1, 2, 4, 5, 6])
    answer = run(engine, {"first": first}, greedy(15, ignore_eos=True))["first"]
    second = prompt(first.token_ids + answer + [7, 8])
    second.positions[:, 5 : 5 + len(answer)] -= 2  # generated tokens stand at index + delta on all axes
    engine.add_request("second", second, greedy(1))
    (output,) = [output for _ in range(2) for output in engine.step()]
    assert output.num_cached_tokens == (5 + 15 - 1) // 4 * 4


def test_random_arrivals_aborts_and_preemptions(alone):
    rng = random.Random(0)
    for round_number in range(12):
        engine = make(
            blocks=rng.choice([19, 23, 30, 60]),
            seqs=rng.choice([2, 5, 16]),
            batched=rng.choice([2, 9, 40]),
            prefix=rng.random() < 0.7,
            encoder_bytes=rng.choice([0, 2000, 1 << 20]),
            max_len=76,
        )
        known, tokens, finished, aborted = requests(), {}, set(), set()
        for step in range(400):
            if step < 150 and rng.random() < 0.4:
                name = rng.choice(sorted(known))
                request_id = f"{name}/{round_number}/{step}"
                engine.add_request(request_id, known[name], greedy(), EOS)
                tokens[request_id] = []
            running = sorted(set(tokens) - finished - aborted)
            if running and rng.random() < 0.08:
                aborted.add(request_id := rng.choice(running))
                engine.abort(request_id)
                engine.check_integrity()
            for output in engine.step():
                assert output.error is None
                tokens[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    finished.add(output.request_id)
            engine.check_integrity()
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    finished.add(output.request_id)
        assert finished | aborted == set(tokens)
        for request_id in finished - aborted:
            assert tokens[request_id] == alone[request_id.split("/")[0]]
        stats = engine.stats()
        assert stats["num_allocated_blocks"] == stats["num_running"] == stats["num_waiting"] == 0


def test_a_pool_of_just_the_largest_request_finishes_all():
    largest = requests()["same start"]
    needed = -(-(len(largest.token_ids) + 12) // 4)
    engine = make(blocks=needed, max_len=needed * 4)
    known = requests() | {f"again {i}": largest for i in range(4)}
    finished = run(engine, known)
    assert all(finished[f"again {i}"] == finished["same start"] for i in range(4))


def test_what_can_never_fit_is_refused():
    engine = make(blocks=10, max_len=600)
    with pytest.raises(ContextLengthError, match=r"52 tokens.*holds 40.*--kv-cache-gb"):
        engine.add_request("big", prompt([1] * 40), greedy())
    with pytest.raises(ContextLengthError, match=r"600 .*--max-model-len"):
        engine.add_request("long", prompt([1] * 600), greedy())
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.add_request("empty", prompt([]), greedy())
    engine.add_request("fits", prompt([1] * 20), greedy())
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add_request("fits", prompt([1]), greedy())
    assert not engine.scheduler.running


def test_a_failing_forward_pass_costs_its_step_only(alone):
    model = FakeModel()
    engine = make(model)
    engine.add_request("lost", requests()["video"], greedy(), EOS)
    engine.step()
    model.fail_forward = True
    (output,) = engine.step()
    assert output.finish_reason == "abort"
    assert "the model broke" in output.error
    engine.check_integrity()
    assert engine.stats()["num_allocated_blocks"] == 0
    model.fail_forward = False
    assert run(engine, requests()) == alone


def test_media_that_cannot_be_encoded_cost_their_request_only(alone):
    model = FakeModel()
    engine = make(model)
    model.fail_encode = True
    engine.add_request("text", requests()["text"], greedy(), EOS)
    engine.add_request("video", requests()["video"], greedy(), EOS)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check_integrity()
    assert [output.request_id for output in outputs if output.error] == ["video"]
    assert [token for output in outputs for token in output.new_token_ids] == alone["text"]
    model.fail_encode = False
    assert run(engine, requests()) == alone


def test_logits_that_are_no_numbers_cost_their_request_only(alone):
    model = FakeModel()
    engine = make(model)
    engine.add_request("first", requests()["text"], greedy(), EOS)
    engine.add_request("second", requests()["one token"], greedy(), EOS)
    model.nan_rows = True
    outputs = engine.step()
    assert [bool(output.error) for output in outputs] == [True, False]
    model.nan_rows = False
    while engine.has_work:
        outputs += engine.step()
    engine.check_integrity()
    second = [token for output in outputs if output.request_id == "second" for token in output.new_token_ids]
    assert second == alone["one token"]


def test_ends(alone):
    engine = make()
    full = alone["text"]

    def end(params, stop=EOS):
        engine.add_request("x", requests()["text"], params, stop)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        tokens = [token for output in outputs for token in output.new_token_ids]
        return tokens, outputs[-1].finish_reason, outputs[-1].stop_reason

    assert end(greedy(4), ()) == (full[:4], "length", None)
    assert end(greedy(12), (full[2],)) == (full[: full.index(full[2]) + 1], "stop", None)
    assert end(greedy(12, stop_token_ids=(full[3],)), ()) == (full[: full.index(full[3]) + 1], "stop", full[3])
    long, reason, _ = end(greedy(5000), ())
    assert (len(long) + 23, reason) == (600, "length")


def test_prefill_never_starves_an_answer_and_chunks_end_at_frames():
    engine = make(batched=20)
    engine.add_request("answering", prompt([1, 2]), greedy(40, ignore_eos=True))
    engine.step()
    engine.add_request("long", prompt([7] * 5, (3, 20)), greedy(2))
    segments = [segment.range for segment in engine._requests["long"].segments]
    while engine._requests["long"].num_computed_tokens < 200:
        scheduled_before = engine._requests["answering"].num_output_tokens
        engine.step()
        assert engine._requests["answering"].num_output_tokens == scheduled_before + 1
        end = engine._requests["long"].num_computed_tokens
        assert not any(r.offset < end < r.end for r in segments)


def test_a_frame_larger_than_a_step_is_cut_inside():
    model = FakeModel()
    engine = make(model, batched=3, prefix=False)
    expected = run(make(prefix=False), {"x": prompt([1], (4, 2), [2])})
    assert run(engine, {"x": prompt([1], (4, 2), [2])}) == expected


def test_first_come_first_served():
    engine = make(seqs=1)
    for name in ("a", "b", "c"):
        engine.add_request(name, prompt([1, 2, 3]), greedy(3, ignore_eos=True))
    order = []
    while engine.has_work:
        order += [output.request_id for output in engine.step()]
    assert order == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
