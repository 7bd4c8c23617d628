"""The frames of one video behind a URL each: in order, one deadline, one byte limit, the first error stops all."""

import asyncio
import base64
import os

import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError, MediaBlockedError, MediaFetchError, MediaTooLargeError
from filmstrip.media.fetch import MAX_FRAMES_AT_ONCE, Fetcher
from tests.media.web import PUBLIC, FakeNetwork, FakeResolver, replying, serving


def fetcher_for(site, **config):
    network = FakeNetwork({(PUBLIC, 80): site.port})
    config = MediaConfig(**{"fetch_timeout_seconds": 20.0, **config})
    return Fetcher(config, FakeResolver(allowed_test=[[PUBLIC]]), network=network)


def read(source):
    with source.open() as file:
        return file.read()


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Frames:
    """Answers each path with itself, later ones sooner; counts how many are asked for at once."""

    def __init__(self):
        self.num_now = self.max_at_once = 0

    async def __call__(self, exchange):
        self.num_now += 1
        self.max_at_once = max(self.max_at_once, self.num_now)
        await asyncio.sleep(0.02 if int(exchange.path[1:]) % MAX_FRAMES_AT_ONCE == 0 else 0)
        self.num_now -= 1
        await exchange.answer(200, "", exchange.path.encode() * 100)


async def test_frames_come_in_order_and_a_few_at_a_time():
    frames = Frames()
    num_fds = len(os.listdir("/proc/self/fd"))
    async with serving(frames) as site:
        fetcher = fetcher_for(site, download_cache_gb=0)
        sources = await fetcher.fetch_frame_urls([f"http://allowed.test/{n}" for n in range(40)])
        await fetcher.close()
    assert [read(source) for source in sources] == [f"/{n}".encode() * 100 for n in range(40)]
    assert 1 < frames.max_at_once <= MAX_FRAMES_AT_ONCE
    assert len({source.content_hash for source in sources}) == 40
    # One descriptor for all of them, not one each.
    assert len(os.listdir("/proc/self/fd")) <= num_fds + 4


async def test_frames_may_be_of_every_kind(tmp_path):
    (tmp_path / "frame.png").write_bytes(b"from a file")
    async with serving(replying(b"from the web")) as site:
        fetcher = fetcher_for(site, allowed_local_media_path=str(tmp_path))
        path = str(tmp_path / "frame.png")
        urls = ["http://allowed.test/1", data_url(b"from the text"), f"file://{path}", path]
        sources = await fetcher.fetch_frame_urls(urls)
        assert [read(source) for source in sources] == [
            b"from the web",
            b"from the text",
            b"from a file",
            b"from a file",
        ]
        assert await fetcher.fetch_frame_urls([]) == []
        again = await fetcher.fetch_frame_urls(urls)
        assert [source.content_hash for source in again] == [source.content_hash for source in sources]
        await fetcher.close()


async def test_too_many_are_refused_before_anything_is_fetched():
    async with serving(replying(b"x")) as site:
        fetcher = fetcher_for(site, max_video_frames=3)
        with pytest.raises(MediaTooLargeError, match=r"4 frames; the limit is 3 .*--max-video-frames") as caught:
            await fetcher.fetch_frame_urls(["http://allowed.test/1"] * 4, param="p")
        assert caught.value.param == "p"
        assert site.num_connections == 0


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ("http://allowed.test/404", MediaFetchError, "frame 2: .*status 404"),
        ("http://127.0.0.1/x", MediaBlockedError, "frame 2: .*public internet"),
        ("ftp://allowed.test/x", MediaBlockedError, "frame 2: .*scheme"),
        ("file:///etc/passwd", MediaBlockedError, "frame 2: local files are not open"),
        ("data:image/png;base64,AAAA,AAAA", MediaFetchError, "frame 2: .*base64"),
        (data_url(b"x" * 2000), MediaTooLargeError, "frame 2: .*--max-media-bytes"),
    ],
)
async def test_the_first_error_names_its_frame_and_stops_the_others(bad, kind, message):
    hanging = asyncio.Event()

    async def handler(exchange):
        if exchange.path == "/404":
            await exchange.answer(404)
        elif exchange.path == "/hang":
            hanging.set()
            await asyncio.sleep(3600)
        else:
            await exchange.answer(200, "", b"frame")

    async with serving(handler) as site:
        fetcher = fetcher_for(site, allow_local_files=False, max_media_bytes=1000)
        before = asyncio.all_tasks()
        urls = ["http://allowed.test/hang", "http://allowed.test/1", bad, *["http://allowed.test/hang"] * 20]
        with pytest.raises(kind, match=message) as caught:
            await fetcher.fetch_frame_urls(urls, param="messages[0]")
        assert type(caught.value) is kind
        assert caught.value.param == "messages[0]"
        assert not [task for task in asyncio.all_tasks() - before if "_fetch" in repr(task)]
        assert len(site.requests) <= MAX_FRAMES_AT_ONCE
        await fetcher.close()


async def test_all_frames_share_one_byte_limit():
    async with serving(replying(b"x" * 400)) as site:
        for cache in (0, 1):
            fetcher = fetcher_for(site, max_media_bytes=1000, download_cache_gb=cache)
            urls = [f"http://allowed.test/{n}" for n in range(3)]
            assert len(await fetcher.fetch_frame_urls(urls[:2])) == 2
            with pytest.raises(MediaTooLargeError, match=r"frame \d: .*1200 bytes; the limit is 1000"):
                await fetcher.fetch_frame_urls(urls)
            with pytest.raises(MediaTooLargeError, match="--max-media-bytes"):
                await fetcher.fetch_frame_urls([urls[0], data_url(b"y" * 400), data_url(b"z" * 400)])
            await fetcher.close()


async def test_kept_frames_count_against_the_limit_too():
    async with serving(replying(b"x" * 400, headers='ETag: "v1"\nCache-Control: max-age=60')) as site:
        fetcher = fetcher_for(site, max_media_bytes=1000)
        await fetcher.fetch("http://allowed.test/1")
        with pytest.raises(MediaTooLargeError):
            await fetcher.fetch_frame_urls(["http://allowed.test/1"] * 3)
        assert len(site.requests) == 1
        await fetcher.close()


async def test_all_frames_share_one_deadline():
    async def handler(exchange):
        await asyncio.sleep(0.2)
        await exchange.answer(200, "", b"frame")

    async with serving(handler) as site:
        fetcher = fetcher_for(site, fetch_timeout_seconds=0.3, download_cache_gb=0)
        with pytest.raises(MediaFetchError, match="--fetch-timeout-seconds") as caught:
            await fetcher.fetch_frame_urls([f"http://allowed.test/{n}" for n in range(3 * MAX_FRAMES_AT_ONCE)])
        assert caught.value.code == "media_fetch_timeout"
        await fetcher.close()


async def test_cancelling_stops_all():
    started = asyncio.Event()

    async def handler(exchange):
        started.set()
        await asyncio.sleep(3600)

    async with serving(handler) as site:
        fetcher = fetcher_for(site)
        before = asyncio.all_tasks()
        task = asyncio.ensure_future(fetcher.fetch_frame_urls([f"http://allowed.test/{n}" for n in range(20)]))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert not [task for task in asyncio.all_tasks() - before if "_fetch" in repr(task)]
        await fetcher.close()


async def test_a_full_disk_is_not_the_requests_fault(monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device", "/secret/path")

    async with serving(replying(b"x" * 400)) as site:
        fetcher = fetcher_for(site)
        monkeypatch.setattr("tempfile.TemporaryFile", full)
        monkeypatch.setattr("filmstrip.media.fetch.MAX_MEMORY_BYTES", 500)
        with pytest.raises(FilmstripError, match="stored here") as caught:
            await fetcher.fetch_frame_urls(["http://allowed.test/1", "http://allowed.test/2"])
        assert caught.value.code == "storage_failed"
        assert "secret" not in caught.value.message
        await fetcher.close()
