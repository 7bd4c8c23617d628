"""What goes wrong stays with the request it goes wrong for, leaves no block held and no wrong content to be found."""

import dataclasses

import pytest
import torch

from filmstrip.errors import ContextLengthError, InvalidRequestError
from filmstrip.types import PlaceholderRange
from tests.engine.helpers import alone, drain, fake_of, greedy, make_engine, run, step
from tests.fakes import FakeModel, feature, prompt

VIDEO = prompt(40, feature(5, num_segments=6, length=4, content=1), seed=3)
TEXT = prompt(30, seed=1)


@pytest.mark.parametrize("num_steps", range(12))
def test_abort_at_every_stage_leaves_nothing(num_steps):
    engine = make_engine(max_num_batched_tokens=7)
    engine.add_request("aborted", VIDEO, greedy(6))
    for _ in range(num_steps):
        step(engine)
    engine.abort("aborted")
    engine.abort("aborted")
    engine.check_integrity()
    assert engine.stats()["num_allocated_blocks"] == 0
    assert not engine.has_work
    assert engine.step() == []
    assert run(engine, {"next": VIDEO})["next"] == alone(VIDEO)


def test_abort_of_preempted_and_waiting_requests():
    engine = make_engine(num_blocks=12, max_model_len=48, prefix=False)
    for seed in range(4):
        engine.add_request(str(seed), prompt(8, seed=seed), greedy(30))
    while not engine.stats()["num_preemptions"]:
        step(engine)
    waiting = [request.request_id for request in engine.scheduler.waiting]
    assert waiting
    for name in waiting:
        engine.abort(name)
        engine.check_integrity()
    assert set(drain(engine)) == {"0", "1", "2", "3"} - set(waiting)


def test_a_request_that_can_never_fit_is_refused():
    engine = make_engine(num_blocks=10, max_model_len=64)
    with pytest.raises(ContextLengthError, match=r"80 tokens.* 64 .*--max-model-len") as caught:
        engine.add_request("long", prompt(80), greedy())
    assert caught.value.param == "messages"
    with pytest.raises(ContextLengthError, match=r"41 tokens.* 40: raise --kv-cache-gb"):
        engine.add_request("long", prompt(31), greedy(10))
    with pytest.raises(ContextLengthError, match="--max-model-len"):
        engine.add_request("no room for an answer", prompt(64), greedy(1))
    assert not engine.has_work
    assert len(run(engine, {"exact": prompt(30)}, greedy(10))["exact"]) == 10


def test_the_context_ends_an_answer():
    engine = make_engine(num_blocks=16, max_model_len=64)
    assert len(run(engine, {"a": prompt(60)}, greedy(100))["a"]) == 4
    engine.add_request("b", prompt(63), dataclasses.replace(greedy(), max_tokens=None))
    (output,) = step(engine)
    assert (len(output.new_token_ids), output.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (prompt(0), InvalidRequestError, "empty"),
        (dataclasses.replace(TEXT, token_ids=[*TEXT.token_ids[:-1], 97]), InvalidRequestError, "97"),
        (dataclasses.replace(TEXT, token_ids=[*TEXT.token_ids[:-1], -1]), InvalidRequestError, "-1"),
        (dataclasses.replace(TEXT, token_ids=TEXT.token_ids[:-1]), ValueError, "positions"),
        (dataclasses.replace(TEXT, features=(feature(28, num_segments=1, length=3),)), ValueError, "segment"),
        (dataclasses.replace(TEXT, features=(feature(3), feature(5))), ValueError, "segment"),
        (dataclasses.replace(TEXT, features=(feature(-1),)), ValueError, "segment"),
        (
            dataclasses.replace(
                TEXT,
                features=(
                    dataclasses.replace(feature(3), segments=tuple(PlaceholderRange(3 * i, 2) for i in range(4))),
                ),
            ),
            ValueError,
            "patch rows",
        ),
        *(
            (
                dataclasses.replace(TEXT, features=(dataclasses.replace(feature(3), segment_grids=grids),)),
                ValueError,
                "9 patch rows are not 3 segments with the grids",
            )
            for grids in (((1, 3), (3, 1)), ((1, 3), (2, 2), (1, 3)), ((0, 3), (3, 2), (3, 1)))
        ),
    ],
)
def test_prompts_that_contradict_themselves_are_refused(bad, error, match):
    engine = make_engine()
    with pytest.raises(error, match=match):
        engine.add_request("bad", bad, greedy())
    assert not engine.has_work


def test_a_placeholder_outside_the_vocabulary_is_no_text():
    """Some checkpoints number their placeholders beyond the vocabulary; penalties must not stumble over them."""
    item = feature(4, num_segments=1, length=4)
    beyond = prompt(12, item)
    beyond.token_ids[4:8] = [5000] * 4
    answer = run(make_engine(), {"a": beyond}, greedy(4, repetition_penalty=1.3))["a"]
    assert len(answer) == 4


def test_a_used_request_id_is_refused():
    engine = make_engine()
    engine.add_request("a", TEXT, greedy())
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add_request("a", VIDEO, greedy())
    assert drain(engine)["a"] == alone(TEXT)


@pytest.mark.parametrize("num_steps_before", [0, 1, 3, 8])
def test_a_failing_forward_pass_fails_the_requests_of_its_step_only(num_steps_before):
    engine = make_engine(max_num_batched_tokens=16, max_num_seqs=2)
    for name, each in {"a": VIDEO, "b": TEXT, "c": prompt(20, seed=8)}.items():
        engine.add_request(name, each, greedy(30))
    for _ in range(num_steps_before):
        step(engine)
    fake_of(engine).fail_next_forward = RuntimeError("out of memory")
    outputs = step(engine)
    failed = [output.request_id for output in outputs if output.error]
    assert 1 <= len(failed) <= 2
    assert all("out of memory" in output.error and output.finish_reason == "abort" for output in outputs)
    drain(engine)
    # What was published before is right; what the failed step half wrote is not to be found.
    assert run(engine, {"a": VIDEO, "b": TEXT}) == {"a": alone(VIDEO), "b": alone(TEXT)}


@pytest.mark.parametrize("budget", [4, 6, 16, 512])
def test_every_step_of_a_request_can_fail(budget):
    """SQLite's loop: fail the n-th step for every n; the next answer is right and no block is lost."""
    for fail_at in range(20):
        engine = make_engine(max_num_batched_tokens=budget)
        engine.add_request("victim", VIDEO, greedy(6))
        for _ in range(fail_at):
            step(engine)
        if not engine.has_work:
            break
        fake_of(engine).fail_next_forward = RuntimeError("injected")
        (output,) = step(engine)
        assert output.error
        assert engine.stats()["num_allocated_blocks"] == 0
        assert run(engine, {"next": VIDEO})["next"] == alone(VIDEO)
    assert fail_at >= 6


def test_media_that_cannot_be_encoded_fail_alone():
    engine = make_engine()
    fake_of(engine).fail_on_patches = bytes([7])
    bad = prompt(30, feature(3, content=7), seed=2)
    for name, each in {"good": VIDEO, "bad": bad, "text": TEXT}.items():
        engine.add_request(name, each, greedy())
    outputs = {output.request_id: output for output in step(engine)}
    assert outputs["bad"].error == "the media could not be encoded: RuntimeError; the server's log says more"
    answers = drain(engine)
    assert [*outputs["good"].new_token_ids, *answers["good"]] == alone(VIDEO)
    assert [*outputs["text"].new_token_ids, *answers["text"]] == alone(TEXT)
    fake_of(engine).fail_on_patches = None
    assert run(engine, {"bad": bad})["bad"] == alone(bad)


def test_media_that_fail_when_nothing_else_runs():
    engine = make_engine()
    fake_of(engine).fail_on_patches = bytes([7])
    engine.add_request("bad", prompt(30, feature(3, content=7)), greedy())
    (output,) = step(engine)
    assert output.error
    assert fake_of(engine).forwards == []
    assert drain(engine) == {}


def test_too_few_embedding_rows_fail_their_request_only():
    """R12: a mismatch of placeholders and rows is that request's error and nobody else's."""
    engine = make_engine()
    run(engine, {"known": VIDEO})
    fake_of(engine).num_rows_too_few = 1
    other = prompt(40, feature(5, content=9), seed=12)
    engine.add_request("other", other, greedy())
    engine.add_request("known", VIDEO, greedy())
    outputs = {output.request_id: output for output in step(engine)}
    assert "2 rows for a media segment of 3 tokens" in outputs["other"].error
    assert outputs["known"].new_token_ids + drain(engine)["known"] == alone(VIDEO)


@pytest.mark.parametrize("budget", [8, 512])
def test_nan_logits_fail_their_row_only_and_poison_nothing(budget):
    engine = make_engine(max_num_batched_tokens=budget)
    marker = next(t for t in TEXT.token_ids[:8] if t not in VIDEO.token_ids + alone(VIDEO))
    fake_of(engine).poison = {marker}
    engine.add_request("bad", TEXT, greedy())
    engine.add_request("good", VIDEO, greedy(4))
    answer = []
    errors = []
    while engine.has_work:
        for output in step(engine):
            answer += output.new_token_ids if output.request_id == "good" else []
            errors += [output] if output.error else []
    assert [error.request_id for error in errors] == ["bad"]
    assert "not numbers" in errors[0].error
    assert answer == alone(VIDEO, greedy(4))
    # The same prompt must not find the blocks that are not numbers.
    fake_of(engine).poison = set()
    assert run(engine, {"again": TEXT})["again"] == alone(TEXT)


def test_nan_logits_make_media_be_encoded_anew():
    engine = make_engine()
    fake_of(engine).poison = {VIDEO.token_ids[0]}
    engine.add_request("bad", VIDEO, greedy())
    (output,) = step(engine)
    assert output.error
    fake_of(engine).poison = set()
    assert run(engine, {"again": VIDEO})["again"] == alone(VIDEO)
    assert engine.stats()["encoded_segments"] == 12


@pytest.mark.parametrize("prompt_tokens", [1, 9, 40])
def test_a_pool_exactly_as_big_as_the_largest_request(prompt_tokens):
    """Livelock: any number of requests that each may need the whole pool come to an end."""
    engine = make_engine(num_blocks=15, max_model_len=60)
    prompts = {str(seed): prompt(prompt_tokens, seed=seed) for seed in range(6)}
    params = greedy(60 - prompt_tokens)
    assert run(engine, prompts, params) == {name: alone(each, params) for name, each in prompts.items()}


def test_one_block():
    engine = make_engine(num_blocks=1, max_model_len=4)
    prompts = {str(seed): prompt(2, seed=seed) for seed in range(3)}
    assert run(engine, prompts, greedy(2)) == {name: alone(each, greedy(2)) for name, each in prompts.items()}


def test_stop_tokens_by_id_and_by_model():
    answer = alone(TEXT)
    engine = make_engine()
    engine.add_request("eos", TEXT, greedy(), (answer[2],))
    engine.add_request("asked", TEXT, greedy(stop_token_ids=(answer[3],)))
    engine.add_request("ignored", TEXT, greedy(4, ignore_eos=True), (answer[2],))
    ends = {}
    while engine.has_work:
        for output in step(engine):
            if output.finish_reason:
                ends[output.request_id] = (output.finish_reason, output.stop_reason, output.new_token_ids)
    assert ends == {
        "eos": ("stop", None, [answer[2]]),
        "asked": ("stop", answer[3], [answer[3]]),
        "ignored": ("length", None, [answer[3]]),
    }


def test_numbers_of_cached_tokens_are_those_of_the_first_scheduling():
    engine = make_engine(model=FakeModel(block_size=8))
    engine.add_request("a", TEXT, greedy(2))
    assert [output.num_cached_tokens for _ in range(2) for output in step(engine)] == [0, 0]
    engine.add_request("b", TEXT, greedy(2))
    assert [output.num_cached_tokens for _ in range(2) for output in step(engine)] == [24, 24]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("/secret/path 0x7f00"), False),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA: process 5 at 0x7f00"), True),
        (RuntimeError("[/secret/alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
    ],
)
def test_errors_tell_users_nothing_of_the_inside(error, is_memory):
    engine = make_engine()
    engine.add_request("a", TEXT, greedy())
    fake_of(engine).fail_next_forward = error
    (output,) = step(engine)
    assert "secret" not in output.error
    assert "0x" not in output.error
    assert ("--max-num-batched-tokens" in output.error) == is_memory


def test_a_broken_device_ends_the_engine():
    engine = make_engine()
    engine.add_request("a", TEXT, greedy())
    fake_of(engine).fail_next_forward = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_logits_that_cannot_be_sampled_fail_their_step_only(monkeypatch):
    def broken(logits, states):
        raise RuntimeError("injected")

    engine = make_engine()
    engine.add_request("a", TEXT, greedy())
    with monkeypatch.context() as patch:
        patch.setattr("filmstrip.engine.engine.sample", broken)
        (output,) = step(engine)
    assert output.error
    assert run(engine, {"next": TEXT})["next"] == alone(TEXT)
