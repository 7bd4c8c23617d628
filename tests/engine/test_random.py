"""Random arrivals, aborts, faults and preemptions over tiny pools: every finished answer is the one computed alone."""

import functools
import random

import pytest

from filmstrip.types import ProcessedPrompt, SamplingParams
from tests.engine.helpers import alone, fake_of, make_engine, step
from tests.fakes import VOCAB_SIZE, feature, prompt


def random_prompt(kind: int) -> ProcessedPrompt:
    """One of a small number of prompts, many of which begin alike."""
    rng = random.Random(kind)
    features, offset = [], rng.randrange(8)
    for _ in range(kind % 4):
        item = feature(
            offset,
            num_segments=rng.randrange(1, 5),
            length=rng.randrange(1, 7),
            gap=rng.randrange(2),
            content=rng.randrange(3),
        )
        features.append(item)
        offset = item.segments[-1].end + rng.randrange(5)
    return prompt(max(offset, rng.randrange(1, 60)), *features, seed=kind % 3)


def params_of(kind: int) -> SamplingParams:
    """Greedy for some, seeded and penalised for others."""
    if kind % 2:
        return SamplingParams(max_tokens=1 + kind % 30, temperature=0)
    return SamplingParams(max_tokens=1 + kind % 30, temperature=0.8, repetition_penalty=1.2, seed=kind, top_k=20)


@functools.cache
def answer_alone(kind: int) -> list[int]:
    """What request ``kind`` answers in an engine of its own."""
    return alone(random_prompt(kind), params_of(kind))


class Simulation:
    """One engine, what is asked of it and what it has answered so far."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        longest = 4 * -(-max(len(random_prompt(kind).token_ids) + 30 for kind in range(40)) // 4)
        self.engine = make_engine(
            num_blocks=longest // 4 + self.random.choice([0, 1, 7, 40]),
            max_model_len=longest,
            max_num_seqs=self.random.choice([1, 2, 5, 16]),
            max_num_batched_tokens=self.random.choice([1, 5, 16, 64, 512]),
            encoder_cache_bytes=self.random.choice([0, 200, 1000, 1 << 20]),
            prefix=self.random.random() < 0.8,
        )
        self.kinds: dict[str, int] = {}
        self.answers: dict[str, list[int]] = {}
        self.num_finished = self.num_aborted = self.num_failed = 0

    def arrive(self) -> None:
        name, kind = f"r{len(self.kinds)}", self.random.randrange(40)
        self.kinds[name], self.answers[name] = kind, []
        self.engine.add_request(name, random_prompt(kind), params_of(kind))

    def abort(self) -> None:
        if self.answers:
            name = self.random.choice(sorted(self.answers))
            self.engine.abort(name)
            del self.answers[name]
            self.num_aborted += 1
        self.engine.check_integrity()

    def fault(self) -> None:
        if self.random.random() < 0.5:
            fake_of(self.engine).fail_next_forward = RuntimeError("injected")
        else:
            fake_of(self.engine).poison = {self.random.randrange(VOCAB_SIZE)}

    def step(self) -> None:
        for output in step(self.engine):
            if output.error is not None:
                del self.answers[output.request_id]
                self.num_failed += 1
                continue
            answer = self.answers[output.request_id]
            answer += output.new_token_ids
            if output.finish_reason is not None:
                assert answer == answer_alone(self.kinds[output.request_id])
                del self.answers[output.request_id]
                self.num_finished += 1
        fake_of(self.engine).poison = set()

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.answers
        assert not self.engine.has_work
        assert self.engine.stats()["num_allocated_blocks"] == 0
        assert self.num_finished + self.num_aborted + self.num_failed == len(self.kinds)


@pytest.mark.parametrize("seed", range(10))
def test_random_arrivals_aborts_and_preemptions(seed):
    simulation = Simulation(seed)
    for _ in range(300):
        draw = simulation.random.random()
        if draw < 0.15:
            simulation.arrive()
        elif draw < 0.18:
            simulation.abort()
        simulation.step()
    simulation.finish()
    assert simulation.num_failed == 0
    assert simulation.num_finished > 15


@pytest.mark.parametrize("seed", range(100, 108))
def test_random_faults(seed):
    """Nothing that a failed step left behind may ever reach another answer."""
    simulation = Simulation(seed)
    for _ in range(300):
        draw = simulation.random.random()
        if draw < 0.2:
            simulation.arrive()
        elif draw < 0.22:
            simulation.abort()
        elif draw < 0.26:
            simulation.fault()
        simulation.step()
    simulation.finish()
    assert simulation.num_failed > 0
    assert simulation.num_finished > 0
