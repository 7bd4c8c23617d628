"""Frames over a real Unix socket: values and pixels arrive as they were sent, and lost descriptors lose nothing else."""

import dataclasses
import gc
import os
import resource
import socket
import threading

import msgspec
import numpy as np
import pytest

from filmstrip import channel
from filmstrip.config import EngineConfig
from filmstrip.engine import messages
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import MediaFeature, Modality, PlaceholderRange, SamplingParams
from tests.fakes import feature, prompt


def open_files():
    gc.collect()  # what other tests left behind must not be closed while this one counts
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def connections():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        yield left, right


def send(connection, message, descriptors=()):
    for data, attached in messages.frame_parts(message, list(descriptors)):
        if attached:
            assert socket.send_fds(connection, [data], attached) == len(data)
        else:
            connection.sendall(data)


def test_a_prompt_arrives_as_it_was_sent(connections):
    left, right = connections
    picture = dataclasses.replace(feature(40, content=2, modality="image"), segment_grids=((1, 3), (3, 1), (1, 3)))
    sent = prompt(60, feature(5, num_segments=6, length=4), picture, seed=3)
    params = SamplingParams(max_tokens=5, temperature=0.5, stop_token_ids=(3, 4), seed=9)
    send(left, *messages.add_request("a", sent, params, (1, 2)))
    payload, descriptors = channel.FrameReader(right).read()
    message = messages.decode_to_engine(payload)
    got = messages.processed_prompt(message, descriptors)
    assert (message.request_id, message.params, message.stop_token_ids) == ("a", params, (1, 2))
    assert got.token_ids == sent.token_ids
    assert got.position_delta == sent.position_delta
    np.testing.assert_array_equal(got.positions, sent.positions)
    for mine, theirs in zip(got.features, sent.features, strict=True):
        np.testing.assert_array_equal(mine.patches.array, theirs.patches.array)
        assert vars(mine) | {"patches": 0} == vars(theirs) | {"patches": 0}
        theirs.patches.array[0, 0] ^= 255
        assert mine.patches.array[0, 0] == theirs.patches.array[0, 0], "pixels were copied"


def test_a_time_series_arrives_as_it_was_sent(connections):
    left, right = connections
    samples = SharedTensor.create((7, 3), "float32")
    samples.array[:] = np.random.default_rng(0).normal(size=(7, 3))
    place = (PlaceholderRange(2, 4),)
    item = MediaFeature(Modality.TIME_SERIES, samples, (1, 1, 1), None, "content", place, hop=160)
    send(left, *messages.add_request("a", prompt(9, item, mrope=False), SamplingParams(), ()))
    payload, descriptors = channel.FrameReader(right).read()
    (got,) = messages.processed_prompt(messages.decode_to_engine(payload), descriptors).features
    assert got.patches.array.dtype == np.float32
    np.testing.assert_array_equal(got.patches.array, samples.array)
    assert vars(got) | {"patches": 0} == vars(item) | {"patches": 0}


def test_how_tokens_are_pooled_arrives_as_it_was_sent(connections):
    left, right = connections
    pooling = np.array([[-1, -1], [0, 2], [1, -1], [-1, -1]], np.int32)
    item = dataclasses.replace(feature(3, num_segments=2, length=4), pooling=pooling)
    send(left, *messages.add_request("a", prompt(20, item), SamplingParams(), ()))
    payload, descriptors = channel.FrameReader(right).read()
    (got,) = messages.processed_prompt(messages.decode_to_engine(payload), descriptors).features
    np.testing.assert_array_equal(got.pooling, pooling)
    assert got.pooling.dtype == np.int32


def test_a_prompt_without_positions_and_media(connections):
    left, right = connections
    send(left, *messages.add_request("a", prompt(5, mrope=False), SamplingParams(), ()))
    payload, descriptors = channel.FrameReader(right).read()
    assert messages.processed_prompt(messages.decode_to_engine(payload), descriptors).positions is None


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_more_descriptors_than_one_message_may_carry(connections, count):
    left, right = connections
    before = open_files()
    sent = prompt(2 * count + 10, *(feature(2 * i, num_segments=1, length=1, content=i % 256) for i in range(count)))
    frames = [messages.add_request("a", sent, SamplingParams(), ()), (messages.Abort("b"), [])]
    sender = threading.Thread(target=lambda: (send(left, *frames[0]), send(left, *frames[1])))
    sender.start()
    reader = channel.FrameReader(right)
    payload, descriptors = reader.read()
    got = messages.processed_prompt(messages.decode_to_engine(payload), descriptors)
    assert [f.patches.array[0, 0] for f in got.features] == [i % 256 for i in range(count)]
    assert messages.decode_to_engine(reader.read()[0]) == messages.Abort("b")
    sender.join()
    del got, sent, sender
    frames.clear()
    assert open_files() == before


def test_a_process_without_room_for_descriptors_loses_only_those(connections):
    left, right = connections
    sent = prompt(50, *(feature(4 * i, num_segments=1, length=2) for i in range(10)))
    send(left, *messages.add_request("a", sent, SamplingParams(), ()))
    send(left, messages.Abort("b"))
    send(left, *messages.add_request("c", sent, SamplingParams(), ()))
    reader, before = channel.FrameReader(right), open_files()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(right.fileno())
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 4, limits[1]))
    try:
        payload, descriptors = reader.read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert descriptors is None
    assert messages.decode_to_engine(payload).request_id == "a"
    assert open_files() == before
    assert messages.decode_to_engine(reader.read()[0]) == messages.Abort("b")
    payload, descriptors = reader.read()
    assert len(descriptors) == 10
    channel.close_all(descriptors)


def test_a_message_that_does_not_fit_its_pixels_closes_them():
    before = open_files()
    item = feature(0)
    message, _ = messages.add_request("a", prompt(20, item, feature(12, num_segments=1)), SamplingParams(), ())
    for descriptors, error in (
        ([os.dup(item.patches.fd)], ValueError),  # one for two
        ([os.dup(item.patches.fd), os.open("/dev/null", os.O_RDWR)], OSError),  # nothing to map
    ):
        with pytest.raises(error):
            messages.processed_prompt(message, descriptors)
    bad = msgspec.structs.replace(message, positions=b"1234")
    with pytest.raises(ValueError):
        messages.processed_prompt(bad, [os.dup(item.patches.fd), os.dup(item.patches.fd)])
    del item, message, bad
    assert open_files() == before


def test_the_end_of_a_stream(connections):
    left, right = connections
    send(left, messages.Start(EngineConfig("m", num_threads=3)))
    left.sendall(b"\1\0\0")
    left.close()
    reader = channel.FrameReader(right)
    assert messages.decode_to_engine(reader.read()[0]) == messages.Start(EngineConfig("m", num_threads=3))
    assert reader.read() is None
    assert reader.read() is None


def test_nothing_else_is_understood():
    for bad in (b"", b"\xc1", messages.encode({"type": "add"}), messages.encode(messages.Stats(1, {}))):
        with pytest.raises(msgspec.MsgspecError):
            messages.decode_to_engine(bad)
