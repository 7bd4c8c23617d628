"""What reaches the engine process from outside its socket, and what a broken socket does: nothing hangs, nothing is left."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from filmstrip import channel
from filmstrip.config import EngineConfig
from filmstrip.engine import messages
from filmstrip.engine.client import EngineClient, environment
from filmstrip.errors import EngineDeadError, EngineOverloadedError
from filmstrip.models.cpu_features import num_usable_cores
from tests.engine.helpers import alone, greedy
from tests.engine.test_process import ROOT, collect, running, settled, video_prompt
from tests.fakes import prompt

FORKING_CLIENT = """
import asyncio, os, time
from filmstrip.engine.client import EngineClient
from tests.engine.test_process import CONFIG, FACTORY

async def main():
    client = await EngineClient.start(CONFIG, model_factory=FACTORY)
    copy = os.fork()
    if copy == 0:
        time.sleep(60)  # holds a copy of the socket
        os._exit(0)
    print(client.pid, copy, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_copy_of_the_client_does_not_keep_the_engine():
    with subprocess.Popen(
        [sys.executable, "-c", FORKING_CLIENT],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdout is not None
        engine, copy = (psutil.Process(int(pid)) for pid in client.stdout.readline().split())
        client.kill()
        client.wait()
        try:
            deadline = time.monotonic() + 15
            while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
            assert copy.is_running()
        finally:
            copy.kill()


async def test_neither_the_terminal_nor_the_working_directory_reaches_the_engine(monkeypatch, tmp_path):
    """A Ctrl-C is the client's to handle; a file that is called like a library is not that library."""
    monkeypatch.syspath_prepend(str(ROOT))
    if sys.version_info >= (3, 11):  # older Pythons always look into the working directory first
        (tmp_path / "queue.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    async with running() as client:
        assert os.getsid(client.pid) == client.pid != os.getsid(0)
        os.kill(client.pid, signal.SIGINT)
        assert await collect(client, "a", video_prompt(1)) == alone(video_prompt(1))


def test_threads_are_bounded_before_libraries_load(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    given, left_open = (environment(EngineConfig("m", num_threads=number)) for number in (2, None))
    assert (given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"], given["NUMBA_NUM_THREADS"]) == ("2", "2", "2")
    assert (left_open["OMP_NUM_THREADS"], left_open["MKL_NUM_THREADS"]) == ("7", str(num_usable_cores()))


async def test_too_many_descriptors_under_way_refuse_one_request(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    real = socket.send_fds
    failures = [OSError(errno.ETOOMANYREFS, "too many references")]

    def send_fds(*arguments):
        if failures:
            raise failures.pop()
        return real(*arguments)

    async with running() as client:
        monkeypatch.setattr(socket, "send_fds", send_fds)
        with pytest.raises(EngineOverloadedError, match="ulimit"):
            await collect(client, "a", video_prompt(1))
        assert await collect(client, "a", video_prompt(1)) == alone(video_prompt(1))


async def test_requests_may_share_a_name_and_are_aborted_by_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    async with running("fake:0.01") as client:
        endless, other = (
            client.generate(name, prompt(9, seed=seed), greedy(1000)) for name, seed in (("a", 1), ("b", 2))
        )
        await anext(endless)
        await anext(other)
        assert await collect(client, "a", prompt(9, seed=3)) == alone(prompt(9, seed=3))
        await client.abort("a")
        await client.abort("never seen")
        assert [output.finish_reason async for output in endless][-1] == "abort"
        assert (await anext(other)).finish_reason is None
        await other.aclose()
        assert (await settled(client))["num_allocated_blocks"] == 0


async def test_a_broken_device_ends_the_process(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    async with running("lost") as client:
        with pytest.raises(EngineDeadError, match="exit code 1"):
            await asyncio.wait_for(collect(client, "a", prompt(5)), 10)
        assert not client.is_alive


@pytest.fixture
def sleeper():
    """A process that says nothing."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "rubbish",
    [
        channel.HEADER.pack(3, 0) + b"\xc1\xc1\xc1",
        channel.HEADER.pack(4, 0) + messages.encode("abc"),
        channel.HEADER.pack(100, 0) + b"cut",
    ],
)
async def test_an_engine_that_talks_rubbish_is_ended(sleeper, rubbish):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    client = EngineClient(sleeper, ours)
    waiting = asyncio.create_task(collect(client, "a", video_prompt(1)))
    await asyncio.sleep(0.05)
    with theirs:
        theirs.sendall(rubbish)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(waiting, 5)
    assert not client.is_alive
    await asyncio.wait_for(client.close(), 5)
    assert not psutil.pid_exists(client.pid)
