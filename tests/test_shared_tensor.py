"""Shared memory: one content in two processes, nothing left behind, limits on open files."""

import os
import resource
import socket

import numpy as np
import pytest

from filmstrip.shared_tensor import SharedTensor, max_kept_tensors, raise_open_files_limit


@pytest.mark.parametrize("shape", [(3, 4), (0, 7), (1,), (2, 3, 5)])
def test_what_one_holder_writes_the_other_reads(shape):
    ours = SharedTensor.create(shape, "int16")
    assert not ours.array.any()
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [ours.fd])
        _, (fd,), _, _ = socket.recv_fds(right, 1, 1)
    theirs = SharedTensor(fd, shape, "int16")
    ours.array[...] = np.arange(ours.array.size).reshape(shape)
    np.testing.assert_array_equal(theirs.array, ours.array)
    assert theirs.torch().shape == shape


def test_descriptors_and_memory_go_with_the_last_holder():
    before = len(os.listdir("/dev/fd"))
    tensor = SharedTensor.create((1000,))
    view = tensor.torch()
    del tensor
    view.fill_(7)  # the tensor keeps the mapping
    assert int(view.sum()) == 7000
    del view
    assert len(os.listdir("/dev/fd")) == before


def test_a_descriptor_that_is_too_small_is_refused_and_closed():
    small = SharedTensor.create((10,))
    fd = os.dup(small.fd)
    with pytest.raises(ValueError):
        SharedTensor(fd, (10**6,), "uint8")
    with pytest.raises(OSError):
        os.fstat(fd)


def test_limits_on_open_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, before[1]), before[1]))
        assert max_kept_tensors() == 100
        raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
