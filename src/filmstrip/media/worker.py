"""The process that decodes one item: bytes come as a descriptor, pixels go into shared memory; knows no URLs and no model.

:func:`main` is the program of the *template*: it imports all that decoding needs, once, and then makes a copy of itself
(``fork``) for each item it is asked for, which takes milliseconds and shares the libraries' memory. The template has one
thread and opens no media. Each copy gives up its rights (:mod:`filmstrip.media.sandbox`) before it sees a byte of its item,
and is killed when the item is done, given up, or over a limit: nothing of one item is left for the next.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import pkgutil
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

import av
import numpy as np
import torch
from PIL import Image

from filmstrip.channel import FrameReader, close_all, send_frame
from filmstrip.errors import FilmstripError, MediaDecodeError, MediaTooLargeError
from filmstrip.media import sandbox
from filmstrip.media import worker_messages as messages
from filmstrip.media.decoders.base import VideoReader
from filmstrip.media.decoders.registry import import_decoder
from filmstrip.media.frames import open_frames
from filmstrip.media.image import open_image, probe_image
from filmstrip.media.patches import PatchWriter, resize_frame
from filmstrip.media.remote import RemoteSource
from filmstrip.media.source import FileSource, MediaSource, SpanSource
from filmstrip.media.time_series import probe_time_series, read_time_series
from filmstrip.media.video import open_video
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import ImageMetadata, TimeSeriesMetadata, VideoMetadata

logger = logging.getLogger(__name__)

PID = struct.Struct("<i")
_NICENESS = 10
"""Behind the engine and the server when cores are short: answers under way should not stop for a video that arrives. A tenth
of a busy core is left for decoding."""


def main() -> None:
    """Serve one parent until it goes."""
    parser = argparse.ArgumentParser(prog="filmstrip media worker")
    parser.add_argument("descriptor", type=int)
    parser.add_argument("--max-memory-bytes", type=int, required=True)
    parser.add_argument("--decoder", action="append", default=[])
    parser.add_argument("--faults", help="module that is imported first and may replace what it likes (used by tests)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the parent's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies that ended are nobody's to wait for
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if arguments.faults:
        importlib.import_module(arguments.faults)
    with contextlib.closing(socket.socket(fileno=arguments.descriptor)) as control:
        _prepare(arguments.decoder)
        _lower_priority_of_session()
        if not sandbox.is_supported():
            logger.warning("this system cannot filter system calls: decoders run with resource limits only")
        _serve_template(control, arguments.max_memory_bytes)


def _prepare(decoders: list[str]) -> None:
    """Load everything now: a copy cannot open a file any more, not even a Python module."""
    for decoder in decoders:
        with contextlib.suppress(FilmstripError):  # a copy says it to whoever asks for the decoder
            import_decoder(decoder)
    for module in pkgutil.walk_packages(av.__path__, "av."):  # PyAV imports some of itself when a file needs it
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("ma", "fft", "linalg", "random", "ctypeslib", "rec", "strings"):  # and so does NumPy
        importlib.import_module(f"numpy.{name}")
    Image.init()
    torch.set_num_threads(1)
    resize_frame(np.zeros((8, 8, 3), np.uint8), 4, 4)
    "".encode("idna")
    gc.collect()
    gc.freeze()


def _lower_priority_of_session() -> None:
    """Let all processes of this session together count as one of ``_NICENESS``.

    Where Linux groups processes by session (``sched_autogroup_enabled``, sched(7)), cores are shared out between sessions
    first, and niceness counts only within one: without this, the engine's session would get no more than this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
        file.write(str(_NICENESS))


def _serve_template(control: socket.socket, max_memory_bytes: int) -> None:
    """Make a copy for each socket that comes, and answer with its process id and, on Linux, a descriptor of it."""
    reader = FrameReader(control)
    while (frame := reader.read()) is not None:
        _, descriptors = frame
        if not descriptors:
            raise ValueError("a request for a worker came without a socket")
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            _run_copy(socket.socket(fileno=descriptors[0]), max_memory_bytes, parent)
        close_all(descriptors)
        _answer_with(control, pid)


def _answer_with(control: socket.socket, pid: int) -> None:
    if not hasattr(os, "pidfd_open"):
        control.sendall(PID.pack(pid))
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:  # it ended already
        control.sendall(PID.pack(0))
        return
    try:
        socket.send_fds(control, [PID.pack(pid)], [process])
    finally:
        os.close(process)


def _run_copy(connection: socket.socket, max_memory_bytes: int, parent: int) -> NoReturn:
    """Never returns into the template's stack: what is there belongs to the template."""
    status = 1
    own_words = _silence_libraries()
    try:
        sandbox.enter(max_memory_bytes=max_memory_bytes, niceness=_NICENESS, parent=parent)
        _Item(connection, max_memory_bytes).serve()
        status = 0
    except ConnectionError:
        pass
    except BaseException:
        traceback.print_exc(file=own_words)
        own_words.flush()
    finally:
        os._exit(status)


def _silence_libraries() -> TextIO:
    """Turn standard error off, where codec libraries complain of every damaged byte; what is returned still leads there."""
    own_words = os.fdopen(os.dup(2), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return own_words


class _Item:
    """One item: opened by the first message, read by those that follow."""

    def __init__(self, connection: socket.socket, max_memory_bytes: int) -> None:
        self._connection, self._max_memory_bytes = connection, max_memory_bytes
        self._first_memory_bytes = _peak_memory_bytes()
        self._read: Callable[[Any, int], tuple[int, ...]] | None = None

    def serve(self) -> None:
        """Answer until the parent goes."""
        reader = FrameReader(self._connection)
        while (frame := reader.read()) is not None:
            payload, descriptors = frame
            answer = self._answer(messages.decode_to_worker(payload), descriptors or [])
            send_frame(self._connection, messages.encode(answer))

    def _answer(self, message: messages.ToWorker, descriptors: list[int]) -> messages.FromWorker:
        try:
            if isinstance(message, messages.ReadPatches | messages.ReadSamples):
                if self._read is None:
                    raise MediaDecodeError("nothing is open")
                delivered = self._read(message, descriptors[0])
                return messages.Done(delivered, _peak_memory_bytes() - self._first_memory_bytes)
            if isinstance(message, messages.CheckDecoders):
                for name in message.names:
                    import_decoder(name)
                return messages.Done(())
            return messages.opened(self._open(message, descriptors))
        except FilmstripError as error:
            return messages.failed(error)
        except MemoryError:
            return messages.failed(self._out_of_memory())
        except RuntimeError as error:
            if "allocate memory" not in str(error):  # PyTorch's word for it
                raise
            return messages.failed(self._out_of_memory())

    def _out_of_memory(self) -> FilmstripError:
        limit = self._max_memory_bytes / 2**30
        return MediaTooLargeError(
            f"decoding needs more memory than {limit:g} GiB (max_decode_memory_gb, --max-decode-memory-gb)"
        )

    def _open(
        self, message: messages.ToWorker, descriptors: list[int]
    ) -> VideoMetadata | ImageMetadata | TimeSeriesMetadata:
        if isinstance(message, messages.OpenVideo):
            source = self._video_source(message, descriptors)
            return self._video(open_video(source, max_pixels=message.max_pixels, decoder=message.decoder))
        whole = FileSource(descriptors[0], "whole")
        if isinstance(message, messages.OpenFrames):
            pictures = [SpanSource(whole, start, stop) for start, stop in message.spans]
            limits = {"max_pixels": message.max_pixels, "max_frames": message.max_frames, "param": message.param}
            return self._video(open_frames(pictures, message.timing, **limits))
        if isinstance(message, messages.OpenTimeSeries):
            return self._time_series(whole, message)
        assert isinstance(message, messages.OpenImage)
        return self._image(whole, message.max_pixels)

    def _video_source(self, message: messages.OpenVideo, descriptors: list[int]) -> MediaSource:
        if message.is_remote:
            return RemoteSource(descriptors[0], socket.socket(fileno=descriptors[1]), message.content_hash)
        return FileSource(descriptors[0], message.content_hash)

    def _video(self, reader: VideoReader) -> VideoMetadata:
        def read(message: messages.ReadPatches, descriptor: int) -> tuple[int, ...]:
            plan = message.plan
            output = SharedTensor(descriptor, plan.patches_shape, "uint8")
            writer = PatchWriter(plan, output.torch())
            return reader.read(plan.frame_indices, writer.write, message.num_threads)

        self._read = read
        return reader.metadata

    def _image(self, source: MediaSource, max_pixels: int) -> ImageMetadata:
        def read(message: messages.ReadPatches, descriptor: int) -> tuple[int, ...]:
            output = SharedTensor(descriptor, message.plan.patches_shape, "uint8")
            PatchWriter(message.plan, output.torch()).write(0, np.array(open_image(source, max_pixels)))
            return message.plan.frame_indices

        self._read = read
        return probe_image(source, max_pixels)

    def _time_series(self, source: MediaSource, opening: messages.OpenTimeSeries) -> TimeSeriesMetadata:
        limits = {"max_values": opening.max_values, "max_channels": opening.max_channels}

        def read(message: messages.ReadSamples, descriptor: int) -> tuple[int, ...]:
            read_time_series(source, **limits, out=SharedTensor(descriptor, message.shape, "float32").array)
            return ()

        self._read = read
        return probe_time_series(source, **limits, sampling_rate=opening.sampling_rate)


def _peak_memory_bytes() -> int:
    """Most resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
