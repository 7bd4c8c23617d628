"""Misbehaving decoders, for workers: imported by the template, it lets marked files do what their first bytes say."""

import os
import signal
import socket
import time

import numpy as np

from filmstrip.media import worker
from filmstrip.media.decoders.base import VideoReader

MARK = b"\0\0\0\x08fault"
"""A file that begins with this is not decoded: what follows, up to a newline, says what happens instead."""

_open_video = worker.open_video


def fault(words):
    """The bytes of a file that misbehaves: "hang", "crash", "exit", "eat", "sleep", "lie" ... when "open" or "read"."""
    return MARK + words.encode() + b"\n"


def _misbehave(words):
    if words == "hang":
        while True:  # in C, where nothing but the kernel can end it
            signal.pause()
    elif words == "crash":
        os.abort()
    elif words == "exit":
        os._exit(0)
    elif words == "eat":
        kept = []
        while True:
            kept.append(bytearray(16 << 20))
    elif words == "raise":
        raise ZeroDivisionError("a defect of ours")
    elif words.startswith("try "):
        _try(words[4:])
    elif words.startswith("sleep"):
        time.sleep(float(words.split()[1]))


def _try(words):
    what = {
        "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "write": lambda: os.open("/dev/shm/filmstrip-fault", os.O_WRONLY | os.O_CREAT),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
        "fork": os.fork,
        "run": lambda: os.execv("/bin/true", ["true"]),
        "kill": lambda: os.kill(os.getppid(), 0),
    }[words]
    what()


class _FaultyReader:
    def __init__(self, reader, words):
        self.metadata = reader.metadata
        self._reader, self._words = reader, words

    def read(self, frame_indices, consume, num_threads, cancel=None):
        if self._words == "lie":
            return tuple(10**6 for _ in frame_indices)
        if self._words == "count":  # what it was given shows in the pixels
            for position in range(len(frame_indices)):
                consume(position, np.full((32, 48, 3), num_threads, np.uint8))
            time.sleep(0.3)
            return tuple(frame_indices)
        _misbehave(self._words)
        return self._reader.read(frame_indices, consume, num_threads, cancel)

    def close(self):
        self._reader.close()


def open_video(source, **options) -> VideoReader:
    """As the worker's own, unless the file's end says otherwise."""
    with source.open() as file:
        data = file.read()
    place = data.rfind(MARK)
    if place < 0:
        return _open_video(source, **options)
    when, _, words = data[place + len(MARK) :].split(b"\n")[0].decode().partition(" ")
    if when == "open":
        _misbehave(words)
    return _FaultyReader(_open_video(source, **options), words if when == "read" else "")


worker.open_video = open_video
