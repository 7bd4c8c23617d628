"""Prompts that begin alike and arrive together: the beginning is computed once, and nobody waits for ever."""

import pytest

from filmstrip.engine import scheduler
from filmstrip.engine.scheduler import MIN_TOKENS_WORTH_WAITING
from tests.engine.helpers import alone, drain, fake_of, greedy, make_engine, run, step
from tests.engine.test_random import Simulation
from tests.fakes import feature, prompt

LENGTH = MIN_TOKENS_WORTH_WAITING + 60


def question(number, *, length=LENGTH, content=7):
    """A long clip and a question of its own about it."""
    each = prompt(length, feature(4, num_segments=12, length=20, content=content), seed=1)
    each.token_ids[-8:] = [number + 1] * 8
    return each


@pytest.mark.parametrize("budget", [64, 2048])
def test_questions_about_a_clip_that_arrive_together_compute_it_once(budget):
    prompts = {str(number): question(number) for number in range(6)}
    engine = make_engine(num_blocks=1024, max_num_batched_tokens=budget)
    assert run(engine, prompts) == {name: alone(each) for name, each in prompts.items()}
    num_computed = sum(sum(counts) for counts in fake_of(engine).forwards)
    num_own = LENGTH - (LENGTH - 8) // 4 * 4 + 7
    slack = 5 * MIN_TOKENS_WORTH_WAITING if budget < LENGTH else 0
    assert num_computed <= LENGTH + 7 + 5 * num_own + slack
    assert engine.stats()["encoded_segments"] == 12


def test_the_others_share_the_blocks():
    engine = make_engine(num_blocks=1024, max_num_batched_tokens=2048)
    for number in range(4):
        engine.add_request(str(number), question(number), greedy(20))
    step(engine)
    assert (engine.stats()["num_running"], engine.stats()["num_waiting"]) == (1, 3)
    step(engine)
    assert engine.stats()["num_running"] == 4
    assert engine.stats()["num_allocated_blocks"] < 2 * LENGTH // 4
    drain(engine)


def test_other_prompts_pass_those_that_wait():
    engine = make_engine(num_blocks=1024, max_num_batched_tokens=2048)
    other_clip = question(0, content=8)
    for name, each in {"a": question(0), "b": question(1), "other": other_clip, "text": prompt(9, seed=4)}.items():
        engine.add_request(name, each, greedy())
    step(engine)
    assert [request.request_id for request in engine.scheduler.running] == ["a", "other", "text"]
    assert [request.request_id for request in engine.scheduler.waiting] == ["b"]
    drain(engine)


def test_short_beginnings_are_not_waited_for():
    engine = make_engine(num_blocks=1024, max_num_batched_tokens=2048)
    for number in range(3):
        each = prompt(MIN_TOKENS_WORTH_WAITING - 4, seed=2)
        each.token_ids[-1] = number
        engine.add_request(str(number), each, greedy())
    step(engine)
    assert engine.stats()["num_running"] == 3
    drain(engine)


def test_nobody_waits_without_a_prefix_cache():
    engine = make_engine(num_blocks=1024, max_num_batched_tokens=2048, prefix=False)
    for number in range(3):
        engine.add_request(str(number), question(number), greedy())
    step(engine)
    assert engine.stats()["num_running"] == 3
    drain(engine)


@pytest.mark.parametrize("end", ["abort", "fault"])
def test_who_is_waited_for_goes_away(end):
    engine = make_engine(num_blocks=1024, max_num_batched_tokens=64)
    for number in range(3):
        engine.add_request(str(number), question(number), greedy())
    step(engine)
    if end == "abort":
        engine.abort("0")
    else:
        fake_of(engine).fail_next_forward = RuntimeError("injected")
        (output,) = step(engine)
        assert (output.request_id, output.error is not None) == ("0", True)
    assert drain(engine) == {str(number): alone(question(number)) for number in (1, 2)}


def test_small_pools_and_many_alike():
    """Waiting, preemption and sharing together come to an end."""
    longest = LENGTH + 100
    engine = make_engine(num_blocks=-(-longest // 4) + 3, max_model_len=longest, max_num_batched_tokens=48)
    prompts = {str(number): question(number % 3, content=7 + number % 2) for number in range(9)}
    assert run(engine, prompts, greedy(90)) == {name: alone(each, greedy(90)) for name, each in prompts.items()}


@pytest.mark.parametrize("seed", range(200, 206))
def test_random_requests_that_wait_for_each_other(monkeypatch, seed):
    monkeypatch.setattr(scheduler, "MIN_TOKENS_WORTH_WAITING", 4)
    simulation = Simulation(seed)
    for _ in range(300):
        draw = simulation.random.random()
        if draw < 0.2:
            simulation.arrive()
        elif draw < 0.22:
            simulation.abort()
        elif draw < 0.23:
            simulation.fault()
        simulation.step()
    simulation.finish()
    assert simulation.num_finished > 15
