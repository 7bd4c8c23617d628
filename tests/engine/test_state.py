"""Recurrent states: each request its own, zeroed, kept at chunk ends and taken up only where it is the right one."""

import dataclasses
import functools

import pytest
import torch

from filmstrip.config import EngineConfig
from filmstrip.engine import kv_cache, sizing
from filmstrip.engine.sizing import GIB, decide_limits
from filmstrip.engine.state_pool import StatePool
from filmstrip.errors import ModelLoadError
from filmstrip.models.base import ModelInfo
from tests.engine.helpers import drain, greedy, run, step
from tests.engine.recurrent_fake import make_recurrent_engine, recurrent_fake_of
from tests.engine.test_random import Simulation, params_of, random_prompt
from tests.fakes import feature, prompt

CLIP = 200


@pytest.fixture(params=[128, 8], ids=["", "dense checkpoints"])
def spacing(request, monkeypatch):
    """Both the real distance between kept states and one at which small prompts have several."""
    monkeypatch.setattr(kv_cache, "MIN_TOKENS_PER_CHECKPOINT", request.param)
    return request.param


def question(number, *, num_tokens=CLIP + 60):
    """A system prompt, a clip and a question of its own about it."""
    each = prompt(num_tokens, feature(140, num_segments=6, length=10), seed=1)
    each.token_ids[CLIP + 20 :] = [number + 1] * (num_tokens - CLIP - 20)
    return each


def alone(each, params=None):
    return run(make_recurrent_engine(prefix=False), {"alone": each}, params)["alone"]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 64, 2048])
@pytest.mark.parametrize("prefix", [True, False])
def test_chunks_of_any_size_give_the_same_tokens(budget, prefix):
    engine = make_recurrent_engine(max_num_batched_tokens=budget, prefix=prefix)
    prompts = {"a": question(0), "b": prompt(33, seed=4), "c": prompt(1, seed=5)}
    assert run(engine, prompts) == {name: alone(each) for name, each in prompts.items()}


def test_a_second_question_begins_with_the_kept_state():
    engine = make_recurrent_engine()
    run(engine, {"first": question(0)})
    assert run(engine, {"second": question(1)})["second"] == alone(question(1))
    hit = engine.stats()["prefix_cache_hit_tokens"]
    assert hit == behind_media(engine, question(0))


def behind_media(engine, each):
    """Where the state behind a prompt's media is kept."""
    return each.features[-1].segments[-1].end // engine.model.info.block_size * engine.model.info.block_size


def test_the_next_turn_begins_where_the_prompt_ended():
    engine = make_recurrent_engine()
    first = prompt(300, seed=2)
    answer = run(engine, {"first": first})["first"]
    second = prompt(300, seed=2)
    second.token_ids.extend([*answer, *prompt(20, seed=3).token_ids])
    second = dataclasses.replace(second, positions=None)
    assert run(engine, {"again": second})["again"] == alone(second)
    assert engine.stats()["prefix_cache_hit_tokens"] == 299 // 4 * 4


@pytest.mark.parametrize("length", [5, 9, 13, 60])
def test_keys_and_values_without_their_state_are_a_miss(length):
    """Every block of the short prompt is cached, but a state was kept at none of their ends."""
    engine = make_recurrent_engine()
    run(engine, {"long": prompt(100, seed=6)})
    assert engine.stats()["num_kept_states"] == 0
    short = prompt(length, seed=6)
    assert run(engine, {"short": short})["short"] == alone(short)
    assert engine.stats()["prefix_cache_hit_tokens"] == 0


def test_a_deeper_miss_falls_back_to_the_kept_state_before_it():
    engine = make_recurrent_engine()
    run(engine, {"first": question(0)})
    longer = question(0)
    longer.token_ids[CLIP + 40 :] = [9] * 20
    assert run(engine, {"longer": longer})["longer"] == alone(longer)
    assert engine.stats()["prefix_cache_hit_tokens"] == behind_media(engine, longer)


def test_without_room_for_states_nothing_is_taken_up():
    engine = make_recurrent_engine(checkpoints=0)
    for name in ("first", "second"):
        assert run(engine, {name: question(0)})[name] == alone(question(0))
    assert engine.stats()["prefix_cache_hit_tokens"] == 0
    assert recurrent_fake_of(engine).num_copies == 0


@pytest.mark.parametrize("checkpoints", [1, 2, 3])
def test_few_kept_states_are_replaced_and_never_mixed_up(spacing, checkpoints):
    engine = make_recurrent_engine(checkpoints=checkpoints)
    prompts = [prompt(150 + 10 * number, seed=number // 3) for number in range(9)]
    for number, each in enumerate(prompts):
        assert run(engine, {str(number): each})[str(number)] == alone(each)
        assert engine.stats()["num_kept_states"] <= checkpoints
    assert engine.stats()["prefix_cache_hit_tokens"] > 0


def test_one_long_prompt_does_not_drive_out_the_others():
    engine = make_recurrent_engine(checkpoints=2, max_num_batched_tokens=32, num_blocks=4096)
    run(engine, {"first": question(0)})
    run(engine, {"long": prompt(900, seed=8)})
    before = engine.stats()["prefix_cache_hit_tokens"]
    assert run(engine, {"second": question(1)})["second"] == alone(question(1))
    assert engine.stats()["prefix_cache_hit_tokens"] - before == behind_media(engine, question(1))


@pytest.mark.parametrize("when", [1, 2, 4])
def test_a_slot_that_was_used_before_begins_empty(when):
    """One slot: a request aborted halfway, then another, then one that finishes, then another."""
    engine = make_recurrent_engine(max_num_seqs=1, max_num_batched_tokens=20, prefix=False)
    engine.add_request("aborted", question(0), greedy(50))
    for _ in range(when):
        step(engine)
    engine.abort("aborted")
    engine.check_integrity()
    for number in range(3):
        each = prompt(30 + number, seed=number)
        assert run(engine, {"next": each})["next"] == alone(each)


def test_an_abort_before_the_first_step_makes_no_copy():
    engine = make_recurrent_engine()
    run(engine, {"first": question(0)})
    engine.add_request("second", question(1), greedy())
    scheduled = engine.scheduler.schedule()
    assert len(scheduled) == 1
    engine.abort("second")
    engine.check_integrity()
    assert engine.cache.states is not None
    assert engine.cache.states.take_copies() == []
    assert run(engine, {"third": question(2)})["third"] == alone(question(2))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("budget", [16, 512])
def test_preempted_requests_compute_their_state_again(spacing, prefix, budget):
    engine = make_recurrent_engine(num_blocks=100, max_model_len=400, prefix=prefix, max_num_batched_tokens=budget)
    prompts = {str(number): prompt(60 + number, seed=number % 2) for number in range(6)}
    params = greedy(60)
    assert run(engine, prompts, params) == {name: alone(each, params) for name, each in prompts.items()}
    assert engine.stats()["num_preemptions"] > 0


def test_questions_that_arrive_together_compute_the_clip_once():
    engine = make_recurrent_engine(num_blocks=4096, max_model_len=4096, max_num_batched_tokens=2048)
    prompts = {}
    for number in range(5):
        each = prompt(1000, feature(4, num_segments=40, length=20), seed=1)
        each.token_ids[-8:] = [number + 1] * 8
        prompts[str(number)] = each
    assert run(engine, prompts) == {name: alone(each) for name, each in prompts.items()}
    num_computed = sum(sum(counts) for counts in recurrent_fake_of(engine).forwards)
    assert num_computed < 1000 + 5 * (1000 - 844 + 8)
    assert engine.stats()["encoded_segments"] == 40


def test_bad_numbers_are_not_taken_up_from_a_kept_state(spacing):
    engine = make_recurrent_engine()
    poisoned = prompt(200, seed=3)
    recurrent_fake_of(engine).poison = {poisoned.token_ids[3]}
    engine.add_request("bad", poisoned, greedy())
    outputs = []
    while engine.has_work:
        outputs += step(engine)
    assert outputs[-1].error == "the model gave logits that are not numbers"
    assert engine.stats()["num_kept_states"] == 0
    recurrent_fake_of(engine).poison = set()
    assert run(engine, {"good": poisoned})["good"] == alone(poisoned)


@functools.cache
def answer_alone(kind):
    return alone(random_prompt(kind), params_of(kind))


class RecurrentSimulation(Simulation):
    """The engine's random simulation, over a recurrent model with few slots."""

    def __init__(self, seed):
        super().__init__(seed)
        limits = self.engine.limits
        self.engine = make_recurrent_engine(
            num_blocks=limits.num_blocks,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            encoder_cache_bytes=limits.encoder_cache_bytes,
            prefix=limits.enable_prefix_caching,
            checkpoints=self.random.choice([0, 1, 3, 20]),
        )


@pytest.mark.parametrize("with_faults", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals(seed, with_faults, monkeypatch):
    """Every finished answer is the one computed alone; states are kept every few tokens, so that they are often taken up."""
    monkeypatch.setattr(kv_cache, "MIN_TOKENS_PER_CHECKPOINT", 4)
    monkeypatch.setattr("tests.engine.test_random.answer_alone", answer_alone)
    simulation = RecurrentSimulation(seed)
    for _ in range(250):
        draw = simulation.random.random()
        if draw < 0.15:
            simulation.arrive()
        elif draw < 0.18:
            simulation.abort()
        elif with_faults and draw < 0.21:
            simulation.fault()
        simulation.step()
    simulation.finish()
    assert simulation.num_finished > 0
    assert simulation.num_failed == 0 or with_faults


def test_the_pool_refuses_what_would_mix_states():
    pool = StatePool(1, 1)
    slot = pool.acquire(None)
    with pytest.raises(ValueError, match="all 1 states are taken"):
        pool.acquire(None)
    pool.release(slot)
    for wrong in (slot, 1, -1):
        with pytest.raises(ValueError, match="no request runs in slot"):
            pool.release(wrong)
    with pytest.raises(ValueError, match="not kept any more"):
        pool.acquire(b"unknown")
    pool.check_integrity([])
    assert pool.keep(b"a", is_likely=True) == 1
    assert pool.keep(b"a", is_likely=True) is None
    assert pool.keep(b"b", is_likely=False) is None
    assert pool.acquire(b"a") == slot
    assert pool.take_copies() == [(1, slot)]
    assert pool.take_copies() == []


INFO = ModelInfo(
    vocab_size=1000,
    hidden_size=64,
    max_position_embeddings=32768,
    num_embedding_rows=1,
    block_size=16,
    kv_bytes_per_token=65536,
    device=torch.device("cpu"),
    dtype=torch.float32,
    state_bytes_per_request=GIB // 64,
)


@pytest.fixture
def free_gigabytes(monkeypatch):
    """10 GiB are free."""
    monkeypatch.setattr(sizing, "free_host_bytes", lambda: 10 * GIB)


def test_the_state_cache_has_its_share_or_what_is_asked_for(free_gigabytes):
    assert decide_limits(EngineConfig("m"), INFO).num_state_checkpoints == 32
    assert decide_limits(EngineConfig("m", state_cache_gb=1), INFO).num_state_checkpoints == 64
    assert decide_limits(EngineConfig("m", state_cache_gb=0), INFO).num_state_checkpoints == 0
    assert decide_limits(EngineConfig("m", enable_prefix_caching=False), INFO).num_state_checkpoints == 0
    without = dataclasses.replace(INFO, state_bytes_per_request=0)
    assert decide_limits(EngineConfig("m", state_cache_gb=1), without).num_state_checkpoints == 0
    small = dataclasses.replace(INFO, state_bytes_per_request=100)
    assert decide_limits(EngineConfig("m", max_num_seqs=2), small).num_state_checkpoints == 4 * 3 * 2


def test_a_gpu_shares_what_is_left_between_states_and_keys(free_gigabytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    info = dataclasses.replace(INFO, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    limits = decide_limits(EngineConfig("m"), info)
    states = (16 + limits.num_state_checkpoints) * info.state_bytes_per_request
    used = limits.num_blocks * 1024**2 + limits.encoder_cache_bytes + states
    assert 14 * GIB < used < 16.6 * GIB


@pytest.mark.parametrize(
    ("options", "param", "match"),
    [
        (
            {"max_num_seqs": 400},
            "max_num_seqs",
            r"400 needs 6.25 GiB .* more than 50% of the 10.00 .*: lower --max-num-s",
        ),
        ({"state_cache_gb": -1}, "state_cache_gb", "at least 0, not -1"),
    ],
)
def test_sizes_that_cannot_work(free_gigabytes, options, param, match):
    with pytest.raises(ModelLoadError, match=match) as caught:
        decide_limits(EngineConfig("m", **options), INFO)
    assert caught.value.param == param


def test_no_state_is_left_behind():
    engine = make_recurrent_engine(max_num_seqs=3)
    for number in range(7):
        engine.add_request(str(number), question(number), greedy(5))
    drain(engine)
    assert engine.cache.states is not None
    engine.cache.states.check_integrity([])
