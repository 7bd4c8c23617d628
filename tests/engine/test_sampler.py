"""Sampling against slow plain definitions in numpy, parameter by parameter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from filmstrip.engine.sampler import SamplingState, sample
from filmstrip.types import SamplingParams

VOCAB = 40


def state_of(prompt=(), output=(), *, vocab=VOCAB, **params):
    state = SamplingState(SamplingParams(**params), list(prompt), vocab, seed=0)
    for token in output:
        state.observe(token)
    return state


def random_logits(seed, vocab=VOCAB, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def penalised(logits, prompt, output, params):
    """Penalties, one token at a time."""
    logits = logits.astype(np.float64)
    for token in range(len(logits)):
        if token in prompt or token in output:
            repetition = params.repetition_penalty
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        logits[token] -= params.frequency_penalty * output.count(token)
        logits[token] -= params.presence_penalty * (token in output)
    return logits


def distribution(logits, prompt, output, params):
    """Probability of each token: penalties, temperature, min_p, top_k, top_p, in this order."""
    logits = penalised(logits, prompt, output, params) / params.temperature
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    weights[weights < params.min_p * weights.max()] = 0
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if params.top_k > 0:
        for token in order[params.top_k :]:
            weights[token] = 0
        order = order[: params.top_k]
    weights /= weights.sum()
    before = 0.0
    for token in order:
        share = weights[token]
        if before >= params.top_p:
            weights[token] = 0
        before += share
    return weights / weights.sum()


def frequencies(logits, state, count):
    """How often each token comes, drawing ``count`` times with the state's own generator."""
    rows = torch.from_numpy(logits).expand(count, -1).contiguous()
    tokens = sample(rows, [state] * count)
    return np.bincount(tokens, minlength=len(logits)) / count


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_k": -1},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.6},
    {"temperature": 1.7, "min_p": 0.02, "top_k": 12, "top_p": 0.8},
    {
        "temperature": 0.7,
        "min_p": 0.01,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distribution(case):
    """The support is exact; frequencies of 6000 draws lie within five standard deviations."""
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 4, 5]
    logits, count = random_logits(7), 6_000
    params = SamplingParams(**case, seed=1)
    expected = distribution(logits, prompt, output, params)
    state = state_of(prompt, output, **case, seed=1)
    found = frequencies(logits, state, count)
    assert not (found > 0)[expected == 0].any()
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "penalty" in str(case)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_takes_the_likeliest_after_penalties(case, seed):
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 4, 5, int(random_logits(seed).argmax())]
    logits, case = random_logits(seed, scale=0.5), {**case, "temperature": 0}
    expected = penalised(logits, prompt, output, SamplingParams(**case)).argmax()
    assert sample(torch.from_numpy(logits)[None], [state_of(prompt, output, **case)]) == [expected]


def test_penalties_do_not_change_the_logits_they_are_given():
    logits = torch.from_numpy(random_logits(1))[None]
    before = logits.clone()
    sample(logits, [state_of([1], [2], repetition_penalty=2.0, presence_penalty=1.0, min_p=0.2, top_p=0.5)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("case", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_ties_go_to_the_lowest_id(case):
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 9, 30]] = 5.0
    assert {sample(logits, [state_of(seed=seed, **case)])[0] for seed in range(20)} == {7}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1}
    assert sample(logits, [state_of([7], [9], temperature=0, **penalties)]) == [30]


def test_top_k_among_ties_takes_the_lowest_ids():
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 9, 30, 31]] = 5.0
    logits[0, 20] = 6.0
    assert {sample(logits, [state_of(seed=seed, top_k=3)])[0] for seed in range(60)} == {20, 7, 9}


def test_a_seed_repeats_its_choices_whoever_else_is_there():
    params = {"temperature": 1.3, "top_p": 0.95}
    steps = [torch.from_numpy(random_logits(seed)) for seed in range(30)]
    alone_state = state_of(seed=5, **params)
    expected = [sample(logits[None], [alone_state])[0] for logits in steps]
    mine, first, last = state_of(seed=5, **params), state_of(seed=6), state_of(temperature=0)
    found = []
    for index, logits in enumerate(steps):
        if index % 2:
            found.append(sample(torch.stack([steps[0], logits, steps[1]]), [first, mine, last])[1])
        else:
            found.append(sample(torch.stack([logits, steps[2]]), [mine, first])[0])
    assert found == expected
    other = state_of(seed=7, **params)
    assert [sample(logits[None], [other])[0] for logits in steps] != expected


def test_requests_without_a_seed_differ():
    logits = torch.zeros(1, VOCAB)
    states = [SamplingState(SamplingParams(), [], VOCAB, seed) for seed in range(2)]
    first, second = ([sample(logits, [state])[0] for _ in range(20)] for state in states)
    assert first != second


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_seed_can_be_used(seed):
    assert sample(torch.zeros(1, VOCAB), [state_of(seed=seed)])[0] in range(VOCAB)


def test_prompt_ids_outside_the_vocabulary_are_ignored():
    logits = torch.from_numpy(random_logits(3))[None]
    state = state_of([1, VOCAB, 10**9, -5], [], temperature=0, repetition_penalty=1.5)
    expected = penalised(logits[0].numpy(), [1], [], SamplingParams(repetition_penalty=1.5)).argmax()
    assert sample(logits, [state]) == [expected]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_that_are_not_numbers_give_no_token(temperature):
    logits = torch.from_numpy(np.stack([random_logits(seed) for seed in range(5)]))
    logits[0, 3] = float("nan")
    logits[1, :] = -float("inf")
    logits[2, 5] = float("inf")
    logits[3, 1:] = -float("inf")
    states = [state_of(temperature=temperature, repetition_penalty=1.1) for _ in range(5)]
    tokens = sample(logits, states)
    assert tokens[:3] == [None, None, None]
    assert tokens[3] == 0
    assert tokens[4] is not None


def test_no_rows():
    assert sample(torch.zeros(0, VOCAB), []) == []


@settings(max_examples=150, deadline=None)
@given(
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 100),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 50.0, 1e4, 1e30]),
    masked=st.integers(0, VOCAB - 1),
    seed=st.integers(0, 50),
)
def test_allowed_parameters_always_give_one_token(masked, scale, seed, **params):
    """Whatever SamplingParams lets through must neither raise nor choose a token that the model ruled out."""
    logits = random_logits(seed) * np.float32(scale)
    logits[masked:] = -np.inf
    logits[0] = np.float32(scale)
    state = state_of([0, 1, VOCAB - 1], [2, VOCAB - 1], **params, seed=seed)
    (token,) = sample(torch.from_numpy(logits)[None], [state])
    assert token is not None
    assert token < max(masked, 1)


def test_a_vocabulary_of_real_size():
    logits = torch.from_numpy(random_logits(1, vocab=151_936))[None]
    expected = distribution(logits[0].numpy(), [], [], SamplingParams(top_k=20, top_p=0.8, temperature=0.7))
    state = state_of(vocab=151_936, top_k=20, top_p=0.8, temperature=0.7, seed=3)
    tokens = {sample(logits, [state])[0] for _ in range(100)}
    assert tokens <= set(np.flatnonzero(expected).tolist())
    assert len(tokens) > 3


@pytest.mark.parametrize("vocab", [128, 129, 1000])
@pytest.mark.parametrize(
    "case",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 60},
        {"top_k": 900},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"min_p": 0.2, "top_p": 0.9},
    ],
    ids=str,
)
def test_no_shortcut_through_a_large_vocabulary_loses_a_token(vocab, case):
    """Values repeat, many are -inf: what can be drawn is what the slow definition leaves, to the last id of a tie."""
    logits = np.round(random_logits(vocab, vocab=vocab))
    logits[np.random.default_rng(1).random(vocab) < 0.3] = -np.inf
    expected = distribution(logits, [], [], SamplingParams(**case))
    found = frequencies(logits, state_of(vocab=vocab, **case, seed=5), 1_500)
    assert not (found > 0)[expected == 0].any()
    likely = expected > 0.01
    assert (found > 0)[likely].all()
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 1_500) + 1e-3)
