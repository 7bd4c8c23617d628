"""Shared media work: one decode for all who want the same pixels, whoever leaves; a bounded cache."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from filmstrip.errors import InvalidRequestError, MediaDecodeError, MediaTooLargeError
from filmstrip.media.loader import FetchedMedia
from filmstrip.media.sampling import candidate_range
from filmstrip.processing.media_pipeline import MediaPipeline
from filmstrip.shared_tensor import SharedTensor
from filmstrip.types import FramePlan, FrameSampling, MediaItem, Modality, PatchLayout, VideoMetadata

LAYOUT = PatchLayout(16, 2, 2)


class FakeOpened:
    def __init__(self, item):
        self.item, self.closed = item, 0
        self.metadata = VideoMetadata(10, 10.0, 1.0, 32, 32, np.arange(10) / 10, "fake")

    def close(self):
        self.closed += 1


class FakeLoader:
    """Decodes when told to; notes everything."""

    def __init__(self):
        self.opened, self.num_reads, self.cancelled = [], 0, 0
        self.go, self.fail = asyncio.Event(), False

    async def fetch(self, item):
        return FetchedMedia(item, None, item.url, 5)

    async def open(self, fetched):
        self.opened.append(FakeOpened(fetched.item))
        return self.opened[-1]

    async def read(self, opened, plan):
        self.num_reads += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        assert not opened.closed
        if self.fail:
            raise MediaDecodeError("broken")
        return SharedTensor.create(plan.patches_shape), plan.frame_indices

    async def close(self):
        pass


class FakeProcessor:
    modalities = frozenset({Modality.IMAGE, Modality.VIDEO})

    def plan_video(self, metadata, sampling, pixels, *, presampled):
        candidate_range(metadata, sampling)
        return FramePlan(tuple(range(sampling.num_frames or 2)), 32, 32, LAYOUT)


def item(name="clip", **sampling):
    return MediaItem(Modality.VIDEO, url=name, sampling=FrameSampling(**sampling))


@pytest.fixture
async def pipeline():
    return MediaPipeline(FakeLoader(), FakeProcessor(), 1 << 20)  # pyright: ignore[reportArgumentType]


async def read(pipeline, what):
    planned = await pipeline.plan(what)
    try:
        return await pipeline.read(planned)
    finally:
        planned.close()


async def start(pipeline, *items):
    tasks = [asyncio.create_task(read(pipeline, each)) for each in items]
    await asyncio.sleep(0.01)
    return tasks


async def test_the_same_pixels_are_decoded_once(pipeline):
    loader = pipeline.loader
    tasks = await start(pipeline, *[item()] * 5, item(num_frames=4))
    assert loader.num_reads == 2
    loader.go.set()
    results = await asyncio.gather(*tasks)
    assert len({id(result.patches) for result in results[:5]}) == 1
    assert results[5].patches is not results[0].patches
    assert all(opened.closed for opened in loader.opened)
    again = await pipeline.plan(item())
    assert again.processed is results[0]
    assert len(loader.opened) == 6  # it was not even opened
    assert (pipeline.stats.hits, pipeline.stats.misses) == (1, 6)


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_whoever_leaves_the_others_get_their_pixels(pipeline, leaver):
    loader = pipeline.loader
    tasks = await start(pipeline, *[item()] * 3)
    tasks[leaver].cancel()
    await asyncio.sleep(0.01)
    loader.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results.pop(leaver), asyncio.CancelledError)
    assert all(result.frame_indices == (0, 1) for result in results)
    assert (loader.num_reads, loader.cancelled) == (1, 0)


async def test_when_all_leave_the_decode_stops_and_the_next_starts_anew(pipeline):
    loader = pipeline.loader
    tasks = await start(pipeline, *[item()] * 2)
    for task in tasks:
        task.cancel()
    (late,) = await start(pipeline, item())
    assert loader.cancelled == 1
    assert all(opened.closed for opened in loader.opened[:2])
    loader.go.set()
    assert (await late).frame_indices == (0, 1)


async def test_a_failed_decode_fails_all_who_wait_and_is_not_kept(pipeline):
    loader = pipeline.loader
    loader.fail = True
    tasks = await start(pipeline, *[item()] * 3)
    loader.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, MediaDecodeError) for result in results)
    loader.fail = False
    assert (await read(pipeline, item())).frame_indices == (0, 1)
    assert loader.num_reads == 2


async def test_the_cache_keeps_the_latest_within_its_bytes(pipeline):
    loader = pipeline.loader
    loader.go.set()
    one = (await read(pipeline, item("a"))).num_bytes
    pipeline._max_cache_bytes = 3 * one
    for name in ("b", "c"):
        await read(pipeline, item(name))
    await read(pipeline, item("a"))  # a is fresher than b now
    await read(pipeline, item("d"))
    assert pipeline.stats.num_bytes == 3 * one
    assert [(await pipeline.plan(item(name))).processed is not None for name in "abcd"] == [True, False, True, True]
    pipeline._max_cache_items = 2
    await read(pipeline, item("e"))
    assert (pipeline.stats.num_items, pipeline.stats.num_bytes) == (2, 2 * one)
    pipeline._max_cache_bytes = one - 1
    await read(pipeline, item("too large"))
    assert (await pipeline.plan(item("too large"))).processed is None


async def test_closing_stops_what_is_under_way(pipeline):
    (task,) = await start(pipeline, item())
    await pipeline.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pipeline.loader.opened[0].closed
    assert threading.active_count() < 50


# Longest part


@pytest.mark.parametrize("fit", [False, True])
async def test_parts_longer_than_allowed_are_refused_or_cut(fit):
    pipeline = MediaPipeline(FakeLoader(), FakeProcessor(), 1 << 20, 0.5)  # pyright: ignore[reportArgumentType]
    if not fit:
        with pytest.raises(
            MediaTooLargeError, match=r"is 1.0 seconds long; the limit is 0.5 \(max_video_duration_seconds"
        ) as caught:
            await pipeline.plan(item())
        assert "start and end" in caught.value.message
    else:
        planned = await pipeline.plan(item(), fit=True)
        assert planned.item.sampling.end_seconds == 0.5
        assert "only 0.5 of 1.0 seconds" in planned.notes[0]
        planned.close()
    part = await pipeline.plan(item(start_seconds=0.4, end_seconds=0.7))
    assert part.notes == ()
    part.close()


async def test_a_part_that_was_cut_is_found_in_the_cache():
    loader = FakeLoader()
    loader.go.set()
    pipeline = MediaPipeline(loader, FakeProcessor(), 1 << 20, 0.5)  # pyright: ignore[reportArgumentType]
    first = await pipeline.plan(item(), fit=True)
    ready = await pipeline.read(first)
    second = await pipeline.plan(item(), fit=True)
    assert (first.processed, second.processed) == (None, ready)
    assert second.item.sampling.end_seconds == 0.5
    assert second.notes == first.notes != ()
    assert await pipeline.read(second) is ready
    assert loader.num_reads == 1
    assert [opened.closed for opened in loader.opened] == [1, 1]
    assert (pipeline.stats.hits, pipeline.stats.misses) == (1, 1)
    with pytest.raises(MediaTooLargeError):  # to be cut was a wish of those who asked
        await pipeline.plan(item())


@pytest.mark.parametrize("longest", [None, 0.5])
@pytest.mark.parametrize("wish", [{"start_seconds": 9.0}, {"start_seconds": 0.11, "end_seconds": 0.12}])
async def test_a_part_without_frames_is_the_fault_of_its_item(longest, wish):
    """Of several videos it can be told which; what the field is called stands in the message."""
    pipeline = MediaPipeline(FakeLoader(), FakeProcessor(), 0, longest)  # pyright: ignore[reportArgumentType]
    asked = dataclasses.replace(item(**wish), param="messages[0].content[1].video_url.url")
    with pytest.raises(InvalidRequestError, match=r"no frame lies (between|from) start") as caught:
        await pipeline.plan(asked)
    assert caught.value.param == asked.param
    assert pipeline.loader.opened[0].closed
    with pytest.raises(InvalidRequestError) as caught:
        await pipeline.plan(item(**wish))
    assert caught.value.param in ("start", "end")
