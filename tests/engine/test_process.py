"""The engine in its own process: concurrency, death on either side, cancellation, descriptors (R01, R06)."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from filmstrip.config import EngineConfig
from filmstrip.engine.client import EngineClient
from filmstrip.errors import ContextLengthError, EngineDeadError, ModelLoadError
from tests.engine.helpers import alone, greedy
from tests.fakes import feature, prompt

FACTORY = "tests.fakes:make_fake_model"
ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig("fake", num_threads=1, kv_cache_gb=0.0002, encoder_cache_gb=0.001, max_model_len=2048)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The engine process must find this package."""
    monkeypatch.syspath_prepend(str(ROOT))


@contextlib.asynccontextmanager
async def running(name="fake", **options):
    client = await EngineClient.start(dataclasses.replace(CONFIG, model=name, **options), model_factory=FACTORY)
    try:
        yield client
    finally:
        await client.close()
        assert not psutil.pid_exists(client.pid)


async def collect(client, name, each, params=None):
    tokens = []
    async with contextlib.aclosing(client.generate(name, each, params or greedy())) as outputs:
        async for output in outputs:
            tokens += output.new_token_ids
    return tokens


async def settled(client):
    """Counters once nothing runs any more."""
    for _ in range(500):
        stats = await client.stats()
        if stats["num_running"] == stats["num_waiting"] == 0:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"requests are left: {stats}")


def video_prompt(seed):
    """Pixels whose content only the shared memory tells."""
    return prompt(30, feature(4, num_segments=4, length=4, content=seed), seed=seed)


async def test_many_requests_at_once_read_their_pixels_from_shared_memory():
    prompts = {f"r{seed}": video_prompt(seed) for seed in range(40)}
    async with running() as client:
        answers = await asyncio.gather(*(collect(client, name, each) for name, each in prompts.items()))
        assert answers == [alone(each) for each in prompts.values()]
        assert len({tuple(answer) for answer in answers}) > 35
        stats = await settled(client)
        assert (stats["num_allocated_blocks"], stats["encoded_segments"]) == (0, 160)


async def test_a_prompt_with_more_media_than_one_message_takes_descriptors():
    items = [feature(3 * i, num_segments=1, length=2, content=i % 200) for i in range(300)]
    each = prompt(900, *items)
    async with running() as client:
        assert await collect(client, "many", each) == alone(each)


async def test_what_the_engine_refuses_is_raised():
    async with running() as client:
        with pytest.raises(ContextLengthError, match="3000 tokens") as caught:
            await collect(client, "long", prompt(3000))
        assert caught.value.param == "messages"
        assert len(await collect(client, "next", prompt(5))) == 8


async def test_a_prompt_that_contradicts_itself_fails_alone():
    wrong = dataclasses.replace(video_prompt(1), token_ids=list(range(10)))
    async with running("fake:0.01") as client:
        other = asyncio.create_task(collect(client, "other", video_prompt(2)))
        with pytest.raises(Exception, match="read"):
            await asyncio.wait_for(collect(client, "wrong", wrong), 5)
        assert await other == alone(video_prompt(2))


async def test_kill_of_the_engine_fails_all_requests_at_once():
    async with running("fake:0.01", max_num_seqs=4) as client:
        tasks = [asyncio.create_task(collect(client, str(i), prompt(5, seed=i), greedy(1500))) for i in range(8)]
        await asyncio.sleep(0.3)
        stats = asyncio.create_task(client.stats())
        os.kill(client.pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(isinstance(result, EngineDeadError) for result in results)
        await asyncio.wait([stats], timeout=5)
        assert stats.done()
        stats.exception()
        assert not client.is_alive
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(collect(client, "later", prompt(5)), 5)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(client.stats(), 5)


async def test_a_stopped_engine_that_is_closed_frees_a_sender_that_waits():
    """The socket is full, nobody reads: closing must end the request, not leave it waiting."""
    async with running("fake:0.01") as client:
        os.kill(client.pid, signal.SIGSTOP)
        big = [asyncio.create_task(collect(client, str(i), prompt(1_000_000))) for i in range(4)]
        await asyncio.sleep(0.3)
        closing = asyncio.create_task(client.close())
        results = await asyncio.wait_for(asyncio.gather(*big, return_exceptions=True), 8)
        assert all(isinstance(result, EngineDeadError) for result in results)
        os.kill(client.pid, signal.SIGCONT)
        await asyncio.wait_for(closing, 20)


@pytest.mark.parametrize(("model", "match"), [("broken", "this checkpoint is broken"), ("crash", "loading went wrong")])
async def test_a_model_that_cannot_be_loaded(model, match):
    with pytest.raises(ModelLoadError, match=match):
        await asyncio.wait_for(EngineClient.start(dataclasses.replace(CONFIG, model=model), model_factory=FACTORY), 60)
    assert await no_children()


async def test_sizes_that_cannot_work_are_load_errors():
    with pytest.raises(ModelLoadError, match="--kv-cache-gb"):
        await EngineClient.start(dataclasses.replace(CONFIG, kv_cache_gb=1e-9), model_factory=FACTORY)


async def test_kill_of_the_engine_while_it_loads():
    before = set(children())
    start = asyncio.create_task(EngineClient.start(dataclasses.replace(CONFIG, model="slow:30"), model_factory=FACTORY))
    await asyncio.sleep(1.0)
    (pid,) = set(children()) - before
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ModelLoadError, match="while loading"):
        await asyncio.wait_for(start, 5)
    assert await no_children()


async def test_cancelling_the_start_leaves_no_process():
    start = asyncio.create_task(EngineClient.start(dataclasses.replace(CONFIG, model="slow:30"), model_factory=FACTORY))
    await asyncio.sleep(0.5)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await no_children()


def children():
    return [child.pid for child in psutil.Process().children() if "filmstrip.engine.process" in _command(child)]


def _command(process):
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


async def no_children():
    for _ in range(300):
        if not children():
            return True
        await asyncio.sleep(0.02)
    return False


CLIENT_SCRIPT = """
import asyncio
from filmstrip.config import EngineConfig
from filmstrip.engine.client import EngineClient
from tests.engine.helpers import greedy
from tests.engine.test_process import CONFIG, FACTORY
from tests.fakes import prompt
import dataclasses

async def main():
    client = await EngineClient.start(dataclasses.replace(CONFIG, model="fake:0.01"), model_factory=FACTORY)
    async for output in client.generate("a", prompt(5), greedy(2000)):
        print(client.pid, flush=True)

asyncio.run(main())
"""


def test_kill_of_the_client_ends_the_engine():
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT_SCRIPT],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdout is not None
        engine = psutil.Process(int(client.stdout.readline()))
        assert engine.is_running()
        client.kill()
    deadline = time.monotonic() + 10
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    # Its new parent may not have collected it yet.
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


async def test_closing_the_iterator_frees_all_blocks():
    async with running("fake:0.005") as client:
        outputs = client.generate("a", video_prompt(1), greedy(1500))
        for _ in range(3):
            await anext(outputs)
        assert (await client.stats())["num_allocated_blocks"] > 0
        await outputs.aclose()
        assert (await settled(client))["num_allocated_blocks"] == 0


async def test_cancelling_at_random_moments_frees_everything():
    chance = random.Random(3)
    async with running("fake:0.002", max_num_seqs=4) as client:
        for wave in range(10):
            each = [prompt(chance.choice([15, 1500]), feature(0, content=wave), seed=i) for i in range(10)]
            tasks = [asyncio.create_task(collect(client, f"{wave}-{i}", p, greedy(400))) for i, p in enumerate(each)]
            del each
            for task in tasks:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01]))
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
        stats = await settled(client)
        assert (stats["num_allocated_blocks"], stats["num_running"], stats["num_waiting"]) == (0, 0, 0)
        assert await collect(client, "next", video_prompt(3)) == alone(video_prompt(3))


async def test_cancelling_while_pixels_are_being_sent_sends_no_other_file():
    """The prompt is gone before its frame is on the wire; its descriptors must stay open until then."""
    async with running() as client:
        os.kill(client.pid, signal.SIGSTOP)  # fills the socket, so that sending takes a while
        filler = asyncio.create_task(collect(client, "filler", prompt(2000)))
        plug = asyncio.create_task(collect(client, "plug", prompt(500_000)))
        await asyncio.sleep(0.1)
        tasks = [asyncio.create_task(collect(client, str(i), video_prompt(i))) for i in range(8)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        del tasks, task
        os.kill(client.pid, signal.SIGCONT)
        assert len(await asyncio.wait_for(filler, 10)) == 8
        with pytest.raises(ContextLengthError):
            await asyncio.wait_for(plug, 10)
        assert await asyncio.wait_for(collect(client, "next", video_prompt(9)), 10) == alone(video_prompt(9))
        assert (await settled(client))["num_allocated_blocks"] == 0
        assert client.is_alive


def num_descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
async def test_no_descriptor_is_left_open():
    async with running() as client:
        await collect(client, "first", video_prompt(0))
        await settled(client)
        before = num_descriptors("self"), num_descriptors(client.pid)
        for start in range(0, 50, 10):
            answers = (collect(client, str(seed), video_prompt(seed)) for seed in range(start, start + 10))
            await asyncio.gather(*answers)
            task = asyncio.create_task(collect(client, "cancelled", video_prompt(start), greedy(1000)))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(ContextLengthError):
                await collect(client, "refused", prompt(2100, feature(3)))
            del task
        await settled(client)
        assert (num_descriptors("self"), num_descriptors(client.pid)) == before


async def test_closing_twice_and_with_requests_under_way():
    async with running("fake:0.01") as client:
        task = asyncio.create_task(collect(client, "a", prompt(5), greedy(1000)))
        await asyncio.sleep(0.2)
        await client.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await asyncio.wait_for(task, 5)
        await client.close()
