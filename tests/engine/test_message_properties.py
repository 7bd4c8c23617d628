"""Any message arrives as it was sent, however the stream is cut into pieces."""

import os
import random
import socket
import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from filmstrip import channel
from filmstrip.engine import messages
from filmstrip.types import ProcessedPrompt, SamplingParams
from tests.fakes import feature, prompt

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
PROMPTS = st.builds(
    lambda token_ids, contents, delta, dtype: ProcessedPrompt(
        token_ids,
        tuple(feature(7 * place, content=content) for place, content in enumerate(contents)),
        None if dtype is None else np.linspace(0, 99.9, 3 * len(token_ids)).astype(dtype).reshape(3, -1),
        delta,
    ),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50),
    st.lists(st.integers(0, 255), max_size=4),
    st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6),
    st.sampled_from([None, np.int32, np.float32]),
)


def send_in_pieces(connection, parts, sizes):
    """What the client sends, but never more than the next of ``sizes`` bytes at a time."""
    for data, descriptors in parts:
        while data:
            piece, data = data[: (size := next(sizes))], data[size:]
            if descriptors:
                socket.send_fds(connection, [piece], descriptors)
            else:
                connection.sendall(piece)
            descriptors = []


def through_a_socket(message, descriptors, sizes, count=1):
    """``count`` times the same frame, read at the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        parts = messages.frame_parts(message, descriptors) * count
        sender = threading.Thread(target=send_in_pieces, args=(ours, parts, sizes))
        sender.start()
        reader = channel.FrameReader(theirs)
        frames = [reader.read() for _ in range(count)]
        sender.join()
    return frames


def ones():
    while True:
        yield 1


def random_sizes(seed):
    chance = random.Random(seed)
    while True:
        yield chance.choice([1, 2, 5, 100, 10_000])


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def check_equal(theirs, mine):
    assert (theirs.token_ids, theirs.position_delta) == (mine.token_ids, mine.position_delta)
    assert (theirs.positions is None) == (mine.positions is None)
    assert mine.positions is None or np.array_equal(theirs.positions, mine.positions)
    assert mine.positions is None or theirs.positions.dtype == mine.positions.dtype
    assert len(theirs.features) == len(mine.features)
    for other, own in zip(theirs.features, mine.features, strict=True):
        assert np.array_equal(other.patches.array, own.patches.array)
        for name in ("modality", "grid_thw", "normalization", "media_hash", "segments", "source_size"):
            assert getattr(other, name) == getattr(own, name)


@settings(max_examples=40, deadline=None)
@given(request_id=st.text(), each=PROMPTS, params=PARAMS, stops=st.lists(st.integers(0, 2**31 - 1)), seed=st.integers())
def test_requests_arrive_as_they_were_sent(request_id, each, params, stops, seed):
    message, descriptors = messages.add_request(request_id, each, params, tuple(stops))
    before = open_files()
    for payload, received in through_a_socket(message, descriptors, random_sizes(seed), count=2):
        arrived = messages.decode_to_engine(payload)
        assert isinstance(arrived, messages.AddRequest)
        assert (arrived.request_id, arrived.params, arrived.stop_token_ids) == (request_id, params, tuple(stops))
        check_equal(messages.processed_prompt(arrived, received), each)
    assert open_files() == before


def test_a_frame_that_comes_in_single_bytes():
    each = prompt(200, feature(5, content=8), feature(30, content=9))
    message, descriptors = messages.add_request("slow", each, SamplingParams(), ())
    for payload, received in through_a_socket(message, descriptors, ones(), count=3):
        theirs = messages.processed_prompt(messages.decode_to_engine(payload), received)
        assert theirs.token_ids == each.token_ids
        assert [item.patches.array.tolist() for item in theirs.features] == [
            item.patches.array.tolist() for item in each.features
        ]


@given(
    st.lists(
        st.builds(
            messages.TokenOutput,
            st.text(),
            st.lists(st.integers(0, 2**31 - 1)),
            st.sampled_from([None, "stop", "length", "abort"]),
            st.none() | st.integers(0, 2**31 - 1),
            st.integers(0, 2**31 - 1),
            st.none() | st.tuples(st.text(), st.text(), st.none() | st.text()),
        )
    )
)
def test_outputs_arrive_as_they_were_sent(outputs):
    assert messages.decode_to_client(messages.encode(messages.Outputs(outputs))) == messages.Outputs(outputs)
