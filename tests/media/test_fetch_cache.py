"""Downloads kept for the next question: what is asked again, what is not kept, and who may share."""

import asyncio
import dataclasses
import email.utils
import os
import time

import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaBlockedError, MediaFetchError, MediaTooLargeError
from filmstrip.media import http_cache
from filmstrip.media.fetch import Fetcher
from filmstrip.media.http_cache import CacheEntry, HttpCache
from filmstrip.media.http_fields import (
    MAX_FRESH_SECONDS,
    Fields,
    Validator,
    content_range,
    fresh_seconds,
    may_be_shared,
    validator_of,
)
from filmstrip.media.source import SpooledBytes
from tests.media.web import OTHER_PUBLIC, PUBLIC, FakeNetwork, FakeResolver, ServedFile, replying, serving

CLIP = bytes(range(256)) * 40
OLD = "Mon, 02 Jan 2023 10:00:00 GMT"
URL = "http://allowed.test/clip.mp4?sig=1"


def fetcher_for(site, other=None, **config):
    resolver = FakeResolver(allowed_test=[[PUBLIC]], other_test=[[OTHER_PUBLIC]])
    network = FakeNetwork({(PUBLIC, 80): site.port, (OTHER_PUBLIC, 80): other.port if other else 1})
    return Fetcher(MediaConfig(**{"fetch_timeout_seconds": 20.0, **config}), resolver, network=network)


def read(source):
    with source.open() as file:
        return file.read()


def http_date(seconds):
    return email.utils.formatdate(seconds, usegmt=True)


def fields_of(text):
    lines = [line.split(": ", 1) for line in text.splitlines()]
    return Fields([(name.encode(), value.encode()) for name, value in lines])


# Asking again


@pytest.mark.parametrize("validators", [{"etag": '"v1"'}, {"etag": None, "last_modified": OLD}, {"last_modified": OLD}])
async def test_a_kept_download_is_asked_about_and_not_downloaded_again(validators):
    served = ServedFile(CLIP, **validators)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        first, second = await fetcher.fetch(URL), await fetcher.fetch(URL + "#t=10")
    assert read(first) == read(second) == CLIP
    assert first.content_hash == second.content_hash
    assert (served.num_whole, served.num_unchanged) == (1, 1)
    name = "If-None-Match" if validators.get("etag", '"v1"') else "If-Modified-Since"
    value = validators.get("etag", '"v1"') or OLD
    assert f"\r\n{name}: {value}\r\n" in site.requests[1]
    assert "If-" not in site.requests[0]
    stats = fetcher.stats
    assert (stats.num_downloads, stats.num_bytes, stats.num_revalidated) == (1, len(CLIP), 1)


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("kind", ["etag", "date"])
async def test_a_changed_file_replaces_what_was_kept(kind, same_size):
    served = ServedFile(CLIP) if kind == "etag" else ServedFile(CLIP, etag=None, last_modified=OLD)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        before = await fetcher.fetch(URL)
        served.body = CLIP[::-1] if same_size else CLIP + b"more"
        served.etag = '"v2"' if kind == "etag" else None
        served.last_modified = None if kind == "etag" else "Mon, 02 Jan 2023 10:00:01 GMT"
        assert read(await fetcher.fetch(URL)) == served.body
        assert read(await fetcher.fetch(URL)) == served.body
        assert read(before) == CLIP
    assert (served.num_whole, served.num_unchanged) == (2, 1)
    assert fetcher.num_cached_bytes == len(served.body)


@pytest.mark.parametrize(
    "served",
    [
        ServedFile(CLIP, etag=None),
        ServedFile(CLIP, etag='W/"v1"'),
        ServedFile(CLIP, etag="v1"),
        ServedFile(CLIP, etag='"v\u00e91"'),
        ServedFile(CLIP, etag=None, last_modified="yesterday"),
        ServedFile(CLIP, etag=None, last_modified=http_date(time.time() + 3600)),
        ServedFile(CLIP, headers="Cache-Control: no-store"),
        ServedFile(CLIP, headers="Cache-Control: max-age=60, private"),
        ServedFile(CLIP, headers='Cache-Control: PRIVATE="set-cookie"'),
        ServedFile(CLIP, headers="Cache-Control: max-age=60\nCache-Control: No-Store"),
        ServedFile(CLIP, headers="Vary: *"),
    ],
    ids=lambda served: f"{served.etag} {served.last_modified} {served.headers}",
)
async def test_what_cannot_or_must_not_be_kept_is_not(served):
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        for _ in range(2):
            assert read(await fetcher.fetch(URL)) == CLIP
        assert fetcher.num_cached_bytes == 0
    assert served.num_whole == 2
    assert "If-" not in site.requests[1]
    served.num_whole = 0


async def test_a_server_may_take_its_permission_back():
    served = ServedFile(CLIP)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        await fetcher.fetch(URL)
        served.headers = "Cache-Control: no-store"
        assert read(await fetcher.fetch(URL)) == CLIP  # a 304: still right for this one request
        assert fetcher.num_cached_bytes == 0
        await fetcher.fetch(URL)
    assert (served.num_whole, served.num_unchanged) == (2, 1)


async def test_a_304_about_another_version_is_not_believed():
    served = ServedFile(CLIP)
    async with serving(served) as site:

        async def confused(exchange):
            if exchange.header("if-none-match"):
                await exchange.answer(304, 'ETag: "v2"', length=False)
            else:
                await served(exchange)

        site._handler = confused
        fetcher = fetcher_for(site)
        await fetcher.fetch(URL)
        served.body = b"new"
        assert read(await fetcher.fetch(URL)) == b"new"


async def test_a_304_that_was_not_asked_for_is_an_error():
    async with serving(replying(b"", 304)) as site:
        with pytest.raises(MediaFetchError, match="304"):
            await fetcher_for(site).fetch(URL)


async def test_urls_are_kept_apart_by_their_query_and_known_in_any_spelling():
    served = ServedFile(CLIP)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        for url in ("http://allowed.test/a?1", "HTTP://Allowed.TEST.:80/a?1#x", "http://allowed.test/a?2"):
            await fetcher.fetch(url)
    assert (served.num_whole, served.num_unchanged) == (2, 1)


async def test_errors_are_not_kept():
    statuses = [500, 200, 404, 304]

    async def handler(exchange):
        await exchange.answer(
            statuses.pop(0), 'ETag: "v1"', CLIP if len(statuses) == 2 else b"", length=len(statuses) > 0
        )

    async with serving(handler) as site:
        fetcher = fetcher_for(site)
        with pytest.raises(MediaFetchError, match="500"):
            await fetcher.fetch(URL)
        assert read(await fetcher.fetch(URL)) == CLIP
        with pytest.raises(MediaFetchError, match="404"):  # what is kept is no answer to a refusal
            await fetcher.fetch(URL)
        assert read(await fetcher.fetch(URL)) == CLIP


async def test_the_cache_can_be_off():
    served = ServedFile(CLIP, headers="Cache-Control: max-age=60")
    async with serving(served) as site:
        fetcher = fetcher_for(site, download_cache_gb=0)
        for _ in range(2):
            assert read(await fetcher.fetch(URL)) == CLIP
    assert served.num_whole == 2


async def test_closing_lets_go_of_what_was_kept():
    async with serving(ServedFile(CLIP)) as site:
        fetcher = fetcher_for(site)
        source = await fetcher.fetch(URL)
        await fetcher.close()
    assert fetcher.num_cached_bytes == 0
    assert read(source) == CLIP


async def test_sync_fetches_share_what_is_kept():
    served = ServedFile(CLIP)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        await fetcher.fetch(URL)
        assert read(await asyncio.to_thread(fetcher.fetch_sync, URL)) == CLIP
    assert (served.num_whole, served.num_unchanged) == (1, 1)


# Redirects and policy


async def test_a_condition_goes_only_to_where_the_file_came_from():
    served, elsewhere = ServedFile(CLIP), ServedFile(b"other file")
    places = ["http://other.test/a", "http://other.test/a", "http://other.test/b"]

    async def redirect(exchange):
        await exchange.answer(302, f'Location: {places.pop(0)}\nETag: "v1"')

    async def other(exchange):
        await (served if exchange.path == "/a" else elsewhere)(exchange)

    async with serving(redirect) as site, serving(other) as second:
        fetcher = fetcher_for(site, second)
        for expected in (CLIP, CLIP, b"other file"):
            assert read(await fetcher.fetch(URL)) == expected
        assert not any("If-" in request for request in site.requests)
        assert ["If-None-Match" in request for request in second.requests] == [False, True, False]
    assert (served.num_whole, served.num_unchanged, elsewhere.num_whole) == (1, 1, 1)


async def test_a_kept_file_does_not_get_around_the_address_check():
    served = ServedFile(CLIP)
    async with serving(served) as site:
        resolver = FakeResolver(allowed_test=[[PUBLIC], ["10.0.0.1"]])
        fetcher = Fetcher(MediaConfig(), resolver, network=FakeNetwork({(PUBLIC, 80): site.port}))
        await fetcher.fetch(URL)
        with pytest.raises(MediaBlockedError):
            await fetcher.fetch(URL)
        assert len(site.requests) == 1


async def test_a_kept_file_does_not_get_around_a_redirect_to_a_private_place():
    answers = [(200, 'ETag: "v1"', CLIP), (302, "Location: http://10.0.0.1/clip.mp4", b"")]

    async def handler(exchange):
        await exchange.answer(*answers.pop(0))

    async with serving(handler) as site:
        fetcher = fetcher_for(site)
        await fetcher.fetch(URL)
        with pytest.raises(MediaBlockedError):
            await fetcher.fetch(URL)


# Freshness


async def test_a_fresh_file_is_used_unasked_until_its_time_is_up(monkeypatch):
    served = ServedFile(CLIP, headers="Cache-Control: max-age=60")
    now = time.monotonic()
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        for _ in range(2):
            assert read(await fetcher.fetch(URL)) == CLIP
        assert len(site.requests) == 1
        monkeypatch.setattr(http_cache.time, "monotonic", lambda: now + 61)
        entry = fetcher._cache.get("http://allowed.test/clip.mp4?sig=1")
        assert not entry.is_fresh
        monkeypatch.undo()
        fetcher._cache.put("http://allowed.test/clip.mp4?sig=1", dataclasses.replace(entry, fresh_until=0.0))
        await fetcher.fetch(URL)
        await fetcher.fetch(URL)  # the 304 made it fresh again
    assert (fetcher.stats.num_fresh, served.num_whole, served.num_unchanged) == (2, 1, 1)


async def test_what_a_redirect_led_to_is_always_asked_about():
    async def redirect(exchange):
        await exchange.answer(302, "Location: http://other.test/a\nCache-Control: max-age=60")

    served = ServedFile(CLIP, headers="Cache-Control: max-age=60")
    async with serving(redirect) as site, serving(served) as second:
        fetcher = fetcher_for(site, second)
        for _ in range(2):
            await fetcher.fetch(URL)
    assert (len(site.requests), served.num_unchanged) == (2, 1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", 0),
        ("Cache-Control: max-age=100", 100),
        ("Cache-Control: public, MAX-AGE=100", 100),
        ('Cache-Control: max-age="100"', 100),
        ("Cache-Control: max-age=100, s-maxage=50", 50),
        ("Cache-Control: max-age=100, max-age=300", 100),
        ("Cache-Control: max-age=100\nAge: 30", 70),
        ("Cache-Control: max-age=100\nAge: 130", 0),
        ("Cache-Control: max-age=100\nAge: soon", 0),
        ("Cache-Control: max-age=31536000", MAX_FRESH_SECONDS),
        ("Cache-Control: max-age=99999999999999999999", 0),
        ("Cache-Control: max-age=-5", 0),
        ("Cache-Control: max-age=nan", 0),
        ("Cache-Control: no-cache, max-age=100", 0),
        (f"Expires: {http_date(2_000_000_000)}\nDate: {http_date(2_000_000_000 - 50)}", 50),
        (f"Expires: {OLD}", 0),
        ("Expires: 0", 0),
        (f"Cache-Control: max-age=100\nDate: {OLD}", 0),
        (f"Last-Modified: {OLD}", 0),
    ],
)
def test_how_long_an_answer_is_fresh(text, seconds):
    assert fresh_seconds(fields_of(text)) == pytest.approx(seconds, abs=1)


def test_validators_are_strong_ones():
    assert validator_of(fields_of('ETag: "a"\nLast-Modified: x')) == Validator(etag='"a"')
    dated = f"Last-Modified: {OLD}\nContent-Length: 7"
    assert validator_of(fields_of(dated)) == Validator(last_modified=OLD, num_bytes=7)
    assert validator_of(fields_of(f'ETag: W/"a"\n{dated}')) == Validator(last_modified=OLD, num_bytes=7)
    assert validator_of(fields_of(f"Last-Modified: {OLD}")) is None
    # Answered in the second in which it was changed: it may change again in it.
    assert validator_of(fields_of(f"{dated}\nDate: {OLD}")) is None
    assert validator_of(fields_of(f"{dated}\nDate: Mon, 02 Jan 2023 10:00:01 GMT")) is not None
    for etag in ('""', '"a b"', '"a"b"', '"a', 'w/"a"', '"a", "b"', '"' + "x" * 2000 + '"'):
        assert validator_of(fields_of(f"ETag: {etag}")) is None


def test_content_ranges_are_read_strictly():
    assert content_range(fields_of("Content-Range: bytes 0-9/20")) == (0, 10, 20)
    for text in (
        "bytes 0-9/*",
        "bytes */20",
        "bytes 0-9",
        "items 0-9/20",
        "bytes=0-9/20",
        "bytes -9/20",
        "bytes 0-9/20, x",
    ):
        assert content_range(fields_of(f"Content-Range: {text}")) is None


def test_what_may_be_shared():
    assert may_be_shared(fields_of("Cache-Control: public, no-cache, must-revalidate\nVary: Origin"))
    assert not may_be_shared(fields_of("Cache-Control: max-age=1,no-store"))
    assert not may_be_shared(fields_of("Vary: Accept, *"))


# Room


def entry_of(num_bytes):
    spool = SpooledBytes(1 << 20)
    spool.write(bytes(num_bytes))
    return CacheEntry("http://x.test/", Validator(etag='"a"'), spool.finish())


def test_the_least_recently_used_go_first():
    cache = HttpCache(100)
    entries = {name: entry_of(40) for name in "abc"}
    cache.put("a", entries["a"])
    cache.put("b", entries["b"])
    assert cache.get("a") is entries["a"]
    cache.put("c", entries["c"])
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (entries["a"], None, entries["c"])
    assert cache.num_bytes_held == 80


def test_a_file_larger_than_the_cache_drives_nothing_out():
    cache = HttpCache(100)
    small = entry_of(40)
    cache.put("a", small)
    cache.put("b", entry_of(101))
    assert (cache.get("a"), cache.get("b"), len(cache)) == (small, None, 1)
    cache.put("a", entry_of(101))  # the old one is wrong by now
    assert len(cache) == 0


def test_the_number_of_files_is_limited_and_dropping_closes_them(monkeypatch):
    monkeypatch.setattr(http_cache, "MAX_ENTRIES", 5)
    num_before = len(os.listdir("/proc/self/fd"))
    cache = HttpCache(1 << 20)
    for number in range(20):
        cache.put(str(number), entry_of(1))
    assert len(cache) == 5
    assert len(os.listdir("/proc/self/fd")) == num_before + 5
    entry = cache.get("19")
    cache.drop("19", entry_of(1))
    assert cache.get("19") is entry
    cache.drop("19", entry)
    assert cache.get("19") is None
    del entry
    cache.clear()
    assert len(os.listdir("/proc/self/fd")) == num_before


# Sharing a download


class SlowFile(ServedFile):
    """Answers when it is told to."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.go = asyncio.Event()

    async def __call__(self, exchange):
        await self.go.wait()
        await super().__call__(exchange)


async def start(fetcher, site, count, **options):
    tasks = [asyncio.create_task(fetcher.fetch(URL, param=f"p{n}", **options)) for n in range(count)]
    await asyncio.wait_for(site.requested.wait(), 10)
    return tasks


async def test_requests_at_the_same_time_share_one_download():
    served = SlowFile(CLIP, etag=None)
    async with serving(served) as site:
        fetcher = fetcher_for(site, download_cache_gb=0)
        tasks = await start(fetcher, site, 5)
        served.go.set()
        assert [read(source) for source in await asyncio.gather(*tasks)] == [CLIP] * 5
        assert (len(site.requests), fetcher.stats.num_shared) == (1, 4)
        await fetcher.fetch(URL)
        assert len(site.requests) == 2


@pytest.mark.parametrize("headers", ["Cache-Control: private", "Cache-Control: no-store"])
async def test_what_must_not_be_shared_is_fetched_for_each(headers):
    served = SlowFile(CLIP, headers=headers)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        tasks = await start(fetcher, site, 3)
        served.go.set()
        assert [read(source) for source in await asyncio.gather(*tasks)] == [CLIP] * 3
        assert (len(site.requests), fetcher.stats.num_shared) == (3, 0)


async def test_cancelling_one_does_not_stop_the_others():
    served = SlowFile(CLIP)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        tasks = await start(fetcher, site, 3)
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.wait([tasks[0], tasks[2]])
        served.go.set()
        assert read(await tasks[1]) == CLIP
        assert tasks[0].cancelled()
        assert len(site.requests) == 1


async def test_the_last_one_to_be_cancelled_stops_the_download():
    served = SlowFile(CLIP)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        before = asyncio.all_tasks()
        tasks = await start(fetcher, site, 3)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        serving_tasks = {task for task in asyncio.all_tasks() - before if "connected" in repr(task)}
        assert asyncio.all_tasks() - before == serving_tasks
        assert fetcher._under_way == {}
        # Who comes now starts anew.
        served.go.set()
        assert read(await fetcher.fetch(URL)) == CLIP


async def test_who_comes_while_the_last_one_leaves_gets_a_download_of_its_own():
    served = SlowFile(CLIP)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        (task,) = await start(fetcher, site, 1)
        task.cancel()
        later = asyncio.create_task(fetcher.fetch(URL))
        served.go.set()
        assert read(await later) == CLIP
        assert task.cancelled()


async def test_an_error_reaches_everybody_with_their_own_field():
    served = SlowFile(CLIP)
    async with serving(served) as site:
        fetcher = fetcher_for(site, max_media_bytes=10)
        tasks = await start(fetcher, site, 3)
        served.go.set()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [MediaTooLargeError] * 3
    assert [error.param for error in errors] == ["p0", "p1", "p2"]
    assert len(site.requests) == 1
