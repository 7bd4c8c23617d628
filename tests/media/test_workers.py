"""Workers: what a broken or hostile decoder can do (nothing but cost its item an error), sharing, cancelling, ending."""

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaDecodeError, MediaTooLargeError
from filmstrip.media import sandbox
from filmstrip.media import worker_messages as messages
from filmstrip.media.loader import MediaLoader
from filmstrip.types import ImageMetadata, MediaItem, Modality
from tests.media.faults import fault
from tests.media.test_loader import PNG, data_url, load, make_video, plan_of, video_item

CLIP = make_video()
linux_only = pytest.mark.skipif(not sandbox.is_supported(), reason="this system cannot filter system calls")

_AUTOGROUP_SWITCH = Path("/proc/sys/kernel/sched_autogroup_enabled")
IS_GROUPED_BY_SESSION = _AUTOGROUP_SWITCH.exists() and _AUTOGROUP_SWITCH.read_text().strip() == "1"


def faulty(words):
    return video_item(data_url("video/mp4", CLIP + fault(words)))


def good():
    return video_item(data_url("video/mp4", CLIP))


@contextlib.asynccontextmanager
async def loading(**options):
    settings = {"num_decode_threads": 2, "decode_timeout_seconds": 60, "max_decode_memory_gb": 0.25}
    loader = MediaLoader(MediaConfig(**{**settings, **options}), faults="tests.media.faults")
    try:
        yield loader
    finally:
        await loader.close()


def children():
    return psutil.Process().children(recursive=True)


async def until(is_so):
    """Wait for what other processes do."""
    for _ in range(1000):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it never came to that; processes: {children()}")


async def no_workers_left(num_left=1):
    """Wait until only the template, or nothing, is left of our processes."""
    await until(lambda: len(children()) <= num_left)


async def works(loader):
    _, patches, indices = await load(loader, good(), plan_of(0, 19))
    return indices == (0, 19) and bool(patches.any())


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("crash", MediaDecodeError, "the decoder crashed on this file"),
        ("exit", MediaDecodeError, "the decoder crashed on this file"),
        ("raise", MediaDecodeError, "the decoder crashed on this file"),
        ("eat", MediaTooLargeError, r"more memory than 0\.25 GiB \(max_decode_memory_gb, --max-decode-memory-gb\)"),
        ("hang", MediaDecodeError, r"longer than 2 seconds \(decode_timeout_seconds, --decode-timeout-seconds\)"),
    ],
)
async def test_a_broken_decoder_costs_its_item_an_error_and_nothing_else(words, kind, message):
    async with loading(decode_timeout_seconds=2.0) as loader:
        await loader.start()
        for when in ("open", "read"):
            bad, other = await asyncio.gather(
                load(loader, faulty(f"{when} {words}"), plan_of(0)), works(loader), return_exceptions=True
            )
            assert isinstance(bad, kind)
            assert re.search(message, bad.message)
            assert bad.param == faulty("").param
            assert other is True
        assert await works(loader)
        await no_workers_left()
        stats = loader.worker_stats
        assert stats.num_timed_out == (2 if words == "hang" else 0)
        assert stats.num_crashed == (2 if words in ("crash", "exit", "raise") else 0)


@linux_only
@pytest.mark.parametrize("what", ["open", "write", "connect", "fork", "run", "kill"])
async def test_a_decoder_that_was_taken_over_reaches_nothing(what, capfd):
    async with loading() as loader:
        for when in ("open", "read"):
            with pytest.raises(MediaDecodeError, match="the decoder crashed"):
                await load(loader, faulty(f"{when} try {what}"), plan_of(0))
            assert "PermissionError" in capfd.readouterr().err
        assert await works(loader)


async def test_a_worker_that_lies_is_not_believed():
    async with loading() as loader:
        with pytest.raises(MediaDecodeError, match="the decoder crashed"):
            await load(loader, faulty("read lie"), plan_of(0))
        assert loader.worker_stats.num_crashed == 1


OPEN_IMAGE = messages.OpenImage(max_pixels=1000)
OPEN_SERIES = messages.OpenTimeSeries(max_values=1000, max_channels=10, sampling_rate=None)
OPEN_VIDEO = messages.OpenVideo("pyav", max_pixels=1000, content_hash="")


def video_opened(fps=1.0, height=5, times=(0.0, 1.0)):
    timestamps = np.array(times, np.float64).tobytes()
    return messages.VideoOpened(2, fps, 1.0, height, 5, timestamps, "pyav", "h264", 0, False, False, False)


@pytest.mark.parametrize(
    ("opening", "message"),
    [
        (OPEN_IMAGE, messages.ImageOpened(10**6, 10**6, "PNG")),
        (OPEN_IMAGE, messages.ImageOpened(0, 5, "PNG")),
        (OPEN_IMAGE, messages.ImageOpened(-2, -2, "PNG")),
        (OPEN_IMAGE, video_opened()),
        (OPEN_SERIES, messages.TimeSeriesOpened(0, 1, None, "npy")),
        (OPEN_SERIES, messages.TimeSeriesOpened(1, 1, float("nan"), "npy")),
        (OPEN_SERIES, messages.TimeSeriesOpened(1001, 1, None, "npy")),
        (OPEN_SERIES, messages.TimeSeriesOpened(1, 11, None, "npy")),
        (OPEN_SERIES, messages.ImageOpened(5, 5, "PNG")),
        (OPEN_VIDEO, messages.Done((0,))),
        (OPEN_VIDEO, messages.ImageOpened(5, 5, "PNG")),
        (OPEN_VIDEO, video_opened(times=[0.0])),
        (OPEN_VIDEO, video_opened(times=[0.0, np.nan])),
        (OPEN_VIDEO, video_opened(times=[1.0, 0.0])),
        (OPEN_VIDEO, video_opened(fps=float("inf"))),
        (OPEN_VIDEO, video_opened(fps=0.0)),
        (OPEN_VIDEO, video_opened(height=10**7)),
    ],
)
def test_descriptions_that_cannot_be_are_refused(opening, message):
    with pytest.raises(ValueError):
        messages.metadata_of(message, opening)


def test_descriptions_that_can_be_are_taken():
    assert messages.metadata_of(messages.ImageOpened(5, 6, "PNG"), OPEN_IMAGE).width == 6
    assert messages.metadata_of(messages.TimeSeriesOpened(100, 10, 8.0, "csv"), OPEN_SERIES).duration == 12.5
    assert messages.metadata_of(video_opened(), OPEN_VIDEO).total_num_frames == 2


def test_errors_of_workers_are_of_known_kinds_and_bounded():
    error = messages.error_of(messages.Failed("SystemExit", "x" * 10**6, None, "code"))
    assert isinstance(error, MediaDecodeError)
    assert len(error.message) <= 1000


async def test_killed_workers_and_templates_are_replaced():
    async with loading() as loader:
        opened = await loader.open(await loader.fetch(good()))
        (template,) = psutil.Process().children()
        (worker,) = template.children()
        worker.kill()
        with pytest.raises(MediaDecodeError, match="crashed"):
            await loader.read(opened, plan_of(0))
        assert await works(loader)
        opened = await loader.open(await loader.fetch(good()))
        template.kill()
        template.wait(5)
        with pytest.raises(MediaDecodeError, match="crashed"):  # it goes when its template goes
            await loader.read(opened, plan_of(0))
        assert await works(loader)
    assert not children()


@linux_only
async def test_workers_stand_behind_everybody_else():
    async with loading() as loader:
        await loader.open(await loader.fetch(good()))
        (template,) = psutil.Process().children()
        (worker,) = template.children()
        assert worker.nice() - psutil.Process().nice() == 10
        if IS_GROUPED_BY_SESSION:
            # Empty for a process that never left the group of the first process.
            groups = [Path(f"/proc/{pid}/autogroup") for pid in (os.getpid(), template.pid, worker.pid)]
            ours, templates, workers = [path.read_text().split() for path in groups]
            assert templates == workers
            assert ours[:1] != workers[:1]
            assert workers[-1] == "10"


async def test_cancelling_ends_the_worker_at_once():
    async with loading() as loader:
        await loader.start()
        await no_workers_left()
        for when in ("open", "read"):
            task = asyncio.create_task(load(loader, faulty(f"{when} hang"), plan_of(0)))
            await until(lambda: len(children()) == 2)
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await no_workers_left()
        assert await works(loader)


async def test_closing_the_loader_ends_everything():
    async def close_in_the_middle():
        async with loading() as loader:
            waiting = await loader.open(await loader.fetch(good()))
            tasks = [asyncio.create_task(load(loader, faulty("read hang"), plan_of(0))) for _ in range(3)]
            await until(lambda: loader.worker_stats.num_started >= 3)
            await asyncio.sleep(0.2)
            await loader.close()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, InterruptedError) for result in results)
            assert not children()
            with pytest.raises(InterruptedError):
                await loader.read(waiting, plan_of(0))

    before = len(os.listdir("/dev/fd"))
    await close_in_the_middle()
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before


def test_a_dying_server_takes_its_workers_with_it(tmp_path):
    program = tmp_path / "server.py"
    program.write_text(
        "import asyncio, os, sys\n"
        "from tests.media.test_workers import loading, load, faulty, plan_of, children\n"
        "async def main():\n"
        "    async with loading() as loader:\n"
        "        asyncio.create_task(load(loader, faulty('read hang'), plan_of(0)))\n"
        "        while len(children()) < 2:\n"
        "            await asyncio.sleep(0.01)\n"
        "        print(*[child.pid for child in children()], flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, env=environment)
    pids = [int(word) for word in process.stdout.readline().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(pids) == 2
    asyncio.run(until(lambda: not any(psutil.pid_exists(pid) for pid in pids)))


@pytest.mark.parametrize(("count", "shares"), [(1, [4]), (2, [2, 2]), (3, [1, 1, 1]), (6, [1] * 4)])
async def test_items_of_one_request_share_the_threads_evenly(count, shares):
    async with loading(num_decode_threads=4) as loader:
        fetched = await loader.fetch(faulty("read count"))
        opened = [await loader.open(fetched) for _ in range(count)]
        results = await asyncio.gather(*[loader.read(each, plan_of(0)) for each in opened])
        given = [int(patches.array[0, 0]) for patches, _ in results]
        assert given[:4] == shares
        # The last two wait; if all others are done by then, they share the threads that those gave back.
        assert all(num_threads in (1, 2) for num_threads in given[4:])


async def test_a_late_item_gets_a_thread_at_once_and_all_come_back():
    async with loading(num_decode_threads=3) as loader:
        fetched = await loader.fetch(faulty("read count"))
        first, second, third = [await loader.open(fetched) for _ in range(3)]
        reads = [asyncio.create_task(loader.read(first, plan_of(0)))]
        await asyncio.sleep(0.1)
        reads.append(asyncio.create_task(loader.read(second, plan_of(0))))
        shares = [int(patches.array[0, 0]) for patches, _ in await asyncio.gather(*reads)]
        assert shares == [3, 1]
        patches, _ = await loader.read(third, plan_of(0))
        assert patches.array[0, 0] == 3


async def test_pictures_do_not_wait_for_videos():
    async with loading(num_decode_threads=1) as loader:
        picture = MediaItem(Modality.IMAGE, url=data_url("image/png", PNG), param="p")
        opened = await loader.open(await loader.fetch(faulty("read hang")))
        video = asyncio.create_task(loader.read(opened, plan_of(0)))
        await asyncio.sleep(0.1)
        metadata, _, _ = await asyncio.wait_for(load(loader, picture, plan_of(0)), 30)
        assert isinstance(metadata, ImageMetadata)
        video.cancel()
        await asyncio.gather(video, return_exceptions=True)


async def test_workers_that_wait_long_are_let_go_and_start_again():
    async with loading() as loader:
        loader._max_parked = 2
        opened = [await loader.open(await loader.fetch(good())) for _ in range(5)]
        await no_workers_left(1 + 2)
        for each in opened:
            assert (await loader.read(each, plan_of(0, 19)))[1] == (0, 19)
        for each in opened:
            each.close()
        assert loader.worker_stats.num_started == 5 + 3
        await no_workers_left()


async def test_secrets_of_the_environment_do_not_reach_workers(monkeypatch):
    monkeypatch.setenv("FILMSTRIP_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    async with loading() as loader:
        await loader.start()
        await no_workers_left()
        (template,) = children()
        environment = template.environ()
        assert "PATH" in environment
        assert not any("secret" in value for value in environment.values())
