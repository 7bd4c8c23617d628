"""Coroutines of a loop that goes on while its program waits, and Ctrl-C."""

import asyncio
import os
import signal
import threading

import pytest

from filmstrip.cli.loop_thread import LoopThread


async def interrupted_while(work):
    """``work`` after this process was sent SIGINT."""
    os.kill(os.getpid(), signal.SIGINT)
    return await work


def test_results_and_errors():
    async def add(a, b):
        await asyncio.sleep(0)
        return a + b

    async def fail():
        raise KeyError("x")

    with LoopThread() as loop:
        assert loop.run(add(1, 2)) == 3
        with pytest.raises(KeyError):
            loop.run(fail())
    assert not any(thread.name == "filmstrip-loop" for thread in threading.enumerate())


def test_ctrl_c_cancels_the_work_and_not_the_program():
    async def stubborn():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            return "so far"

    with LoopThread() as loop:
        assert loop.run(interrupted_while(stubborn())) == "so far"
        with pytest.raises(asyncio.CancelledError):
            loop.run(interrupted_while(asyncio.sleep(60)))


def test_the_loop_goes_on_between_runs():
    ran = threading.Event()

    async def later():
        asyncio.get_running_loop().call_later(0.01, ran.set)

    with LoopThread() as loop:
        loop.run(later())
        assert ran.wait(30)
