"""Parts of large files: what is asked for, what is believed, what is shared, and that nothing is left behind."""

import asyncio
import gc
import os
import random

import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError, MediaBlockedError, MediaFetchError, MediaTooLargeError
from filmstrip.media import sparse as sparse_module
from filmstrip.media.fetch import Fetcher
from filmstrip.media.source import FileSource
from filmstrip.media.sparse import BLOCK_BYTES, MAX_CONNECTIONS, MAX_REQUEST_BYTES, SparseFile
from tests.media.web import OTHER_PUBLIC, PUBLIC, FakeNetwork, FakeResolver, ServedFile, serving

NUM_BLOCKS = 64
BODY = random.Random(5).randbytes(NUM_BLOCKS * BLOCK_BYTES - 1000)
URL = "http://allowed.test/clip.mp4"
OLD = "Mon, 02 Jan 2023 10:00:00 GMT"


@pytest.fixture(autouse=True)
def small_files_are_sparse(monkeypatch):
    monkeypatch.setattr("filmstrip.media.fetch.MIN_SPARSE_BYTES", len(BODY))


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Leave everything that was imported out of the many garbage collections here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
async def nothing_is_left_behind(tmp_path, monkeypatch):
    """No descriptor, task or temporary file after the test, whatever it did."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gc.collect()
    num_fds, tasks = len(os.listdir("/proc/self/fd")), asyncio.all_tasks()
    yield
    await settled(lambda: asyncio.all_tasks() - {asyncio.current_task()} <= tasks)
    gc.collect()
    await settled(lambda: len(os.listdir("/proc/self/fd")) <= num_fds)
    assert list(tmp_path.iterdir()) == []


async def settled(condition):
    """Wait until ``condition`` holds; fails after some seconds."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"never came true; tasks: {asyncio.all_tasks()}")


def fetcher_for(site, resolver=None, **config):
    resolver = resolver or FakeResolver(allowed_test=[[PUBLIC]])
    network = FakeNetwork({(PUBLIC, 80): site.port})
    return Fetcher(MediaConfig(**{"fetch_timeout_seconds": 20.0, **config}), resolver, network=network)


async def opened(fetcher):
    file = await fetcher.fetch(URL, sparse=True)
    assert isinstance(file, SparseFile)
    return file


def at(file, start, stop):
    return os.pread(file.fd, stop - start, start)


def blocks(*pairs):
    return [(first * BLOCK_BYTES, min(end * BLOCK_BYTES, len(BODY))) for first, end in pairs]


async def ensured(file, start, stop):
    """Ensure a range away from where the reader is, so that nothing is read ahead."""
    await file.ensure(start, stop)
    assert file.is_present(start, stop)
    assert at(file, start, stop) == BODY[start:stop]


# What is sparse


async def test_nothing_is_fetched_until_it_is_needed():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        assert (file.num_bytes, file.num_bytes_fetched, file.block_bytes) == (len(BODY), 0, BLOCK_BYTES)
        assert os.fstat(file.fd).st_size == len(BODY)
        assert not file.is_present(0, 1)
        start = 10 * BLOCK_BYTES + 5
        await ensured(file, start, start + 10)
        assert served.ranges == blocks((10, 11))
        assert file.is_present(10 * BLOCK_BYTES, 11 * BLOCK_BYTES)
        assert file.num_bytes_fetched == BLOCK_BYTES
        assert os.fstat(file.fd).st_blocks * 512 <= 4 * BLOCK_BYTES
        assert fetcher.stats.num_bytes == BLOCK_BYTES
        head = site.requests[-1]
        for line in (f"Range: bytes={10 * BLOCK_BYTES}-{11 * BLOCK_BYTES - 1}", 'If-Range: "v1"', "Host: allowed.test"):
            assert f"\r\n{line}\r\n" in head
        await fetcher.close()


async def test_all_of_it_can_be_had():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        with pytest.raises(ValueError, match="missing"):
            file.open()
        await ensured(file, len(BODY) - 1, len(BODY))
        await file.ensure(0, file.num_bytes)
        with file.open() as whole:
            assert whole.read() == BODY
        assert file.num_bytes_fetched == len(BODY)
        await fetcher.close()


async def test_the_descriptor_cannot_be_written_through():
    async with serving(ServedFile(BODY)) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        with pytest.raises(OSError):
            os.pwrite(file.fd, b"x", 0)
        await fetcher.close()


def chunked(served):
    """The same file without a length."""

    async def handler(exchange):
        head = ["HTTP/1.1 200 OK", *served.fields().splitlines(), "Transfer-Encoding: chunked", "", ""]
        await exchange.send("\r\n".join(head).encode())
        await exchange.send(b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n")

    return handler


def without_ranges():
    served = ServedFile(BODY)
    served.accepts_ranges = False
    return served


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param(without_ranges(), id="no ranges"),
        pytest.param(ServedFile(BODY, etag=None), id="no validator"),
        pytest.param(ServedFile(BODY, etag='W/"v1"'), id="weak validator"),
        pytest.param(ServedFile(BODY[:-1]), id="small"),
        pytest.param(chunked(ServedFile(BODY)), id="no length"),
    ],
)
async def test_what_cannot_be_sparse_is_downloaded_whole(handler):
    async with serving(handler) as site:
        fetcher = fetcher_for(site)
        source = await fetcher.fetch(URL, sparse=True)
        assert isinstance(source, FileSource)
        with source.open() as file:
            assert file.read() == BODY[: source.num_bytes]
        assert source.num_bytes >= len(BODY) - 1
        del source, file
        await fetcher.close()


async def test_only_who_asks_for_it_gets_a_sparse_file():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        assert isinstance(await fetcher.fetch(URL), FileSource)
        assert isinstance(await fetcher.fetch(URL, sparse=True), FileSource)  # the whole of it is here already
        await fetcher.close()
    assert (served.num_whole, served.num_unchanged) == (1, 1)


async def test_a_date_and_a_size_are_a_validator():
    served = ServedFile(BODY, etag=None, last_modified=OLD)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await ensured(file, 0, 10)
        assert f"\r\nIf-Range: {OLD}\r\n" in site.requests[-1]
        await fetcher.close()


async def test_the_hash_tells_versions_and_places_apart():
    hashes = set()
    for etag, body in (('"v1"', BODY), ('"v1"', BODY), ('"v2"', BODY), ('"v1"', BODY + b"x")):
        async with serving(ServedFile(body, etag=etag)) as site:
            fetcher = fetcher_for(site)
            hashes.add((await opened(fetcher)).content_hash)
            await fetcher.close()
    assert len(hashes) == 3


async def test_a_file_over_the_limit_is_refused():
    async with serving(ServedFile(BODY)) as site:
        fetcher = fetcher_for(site, max_media_bytes=len(BODY) - 1)
        with pytest.raises(MediaTooLargeError):
            await fetcher.fetch(URL, sparse=True)
        await fetcher.close()


async def test_ranges_outside_the_file_are_the_callers_mistake():
    async with serving(ServedFile(BODY)) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        for start, stop in ((-1, 5), (5, 4), (0, len(BODY) + 1)):
            with pytest.raises(ValueError):
                await file.ensure(start, stop)
        await file.ensure(len(BODY), len(BODY))
        assert file.num_bytes_fetched == 0
        await fetcher.close()


# What is asked for


async def test_only_missing_blocks_are_asked_for_and_neighbours_together():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await ensured(file, *blocks((20, 22))[0])
        await ensured(file, *blocks((30, 31))[0])
        served.ranges.clear()
        await ensured(file, *blocks((18, 33))[0])
        assert sorted(served.ranges) == blocks((18, 20), (22, 30), (31, 33))
        served.ranges.clear()
        # Neighbours asked for in the same turn are one request, too; the second one looks like a reader that goes on.
        await asyncio.gather(*[file.ensure(*pair) for pair in blocks((40, 41), (41, 43), (43, 44))])
        assert served.ranges == blocks((40, 45))
        await fetcher.close()


async def test_large_parts_are_asked_for_in_pieces(monkeypatch):
    monkeypatch.setattr(sparse_module, "MAX_REQUEST_BYTES", 16 * BLOCK_BYTES)
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await file.ensure(0, len(BODY))
        assert sorted(served.ranges) == blocks((0, 16), (16, 32), (32, 48), (48, 64))
        assert MAX_REQUEST_BYTES % BLOCK_BYTES == 0
        await fetcher.close()


async def test_a_reader_that_goes_on_gets_growing_parts():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        for number in range(NUM_BLOCKS):
            await ensured(file, *blocks((number, number + 1))[0])
        sizes = [(stop - start) // BLOCK_BYTES for start, stop in served.ranges]
        assert sizes[:4] == [4, 8, 16, 32]
        assert len(sizes) == 5
        assert file.num_bytes_fetched == len(BODY)
        await fetcher.close()


async def test_a_reader_that_jumps_gets_what_it_asks_for():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        for number in (50, 10, 30, 20):
            await ensured(file, *blocks((number, number + 1))[0])
        assert served.ranges == blocks((50, 51), (10, 11), (30, 31), (20, 21))
        await fetcher.close()


async def test_nothing_is_read_ahead_of_what_was_announced():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        file.prefetch(blocks((10, 14), (14, 16), (40, 42)))
        for number in [*range(10, 16), 40, 41]:
            await asyncio.sleep(0)
            await ensured(file, *blocks((number, number + 1))[0])
        assert served.ranges == blocks((10, 16), (40, 42))
        await fetcher.close()


async def test_what_is_announced_comes_in_order_and_what_is_waited_for_first():
    gate = asyncio.Event()

    async def part(exchange, start, stop):
        await gate.wait()
        return False

    served = ServedFile(BODY)
    served.part = part
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        file.prefetch(blocks(*[(number, number + 1) for number in (50, 40, 30, 20, 10)]))
        await settled(lambda: len(served.ranges) == 3)
        assert sorted(served.ranges) == blocks((30, 31), (40, 41), (50, 51))
        waiting = asyncio.ensure_future(file.ensure(*blocks((5, 6))[0]))
        await settled(lambda: len(served.ranges) == 4)
        assert served.ranges[3:] == blocks((5, 6))
        gate.set()
        await waiting
        await settled(lambda: len(served.ranges) == 6)
        assert sorted(served.ranges[4:]) == blocks((10, 11), (20, 21))
        await settled(lambda: file.num_bytes_fetched == 6 * BLOCK_BYTES)
        await fetcher.close()


async def test_at_most_four_connections_are_used_and_used_again():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await settled(lambda: site.num_open == 0)
        numbers = random.Random(1).sample(range(0, NUM_BLOCKS, 2), 30)
        await asyncio.gather(*[ensured(file, *blocks((number, number + 1))[0]) for number in numbers])
        assert site.num_connections <= 1 + MAX_CONNECTIONS
        assert len(served.ranges) >= 15
        file.close()
        await settled(lambda: site.num_open == 0)
        await fetcher.close()


async def test_waiters_for_the_same_block_share_a_request():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file, other = await opened(fetcher), await opened(fetcher)
        assert (served.num_whole, served.num_unchanged) == (1, 1)
        pair = blocks((20, 24))[0]
        await asyncio.gather(*[ensured(each, *pair) for each in (file, other) for _ in range(5)])
        assert served.ranges == [pair]
        assert file.num_bytes_fetched == other.num_bytes_fetched == 4 * BLOCK_BYTES
        await fetcher.close()


async def test_random_readers_get_the_right_bytes():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        files = [await opened(fetcher) for _ in range(3)]
        chance = random.Random(3)

        async def read(file):
            for _ in range(40):
                start = chance.randrange(len(BODY))
                stop = min(len(BODY), start + chance.randrange(1, 5 * BLOCK_BYTES))
                task = asyncio.ensure_future(file.ensure(start, stop))
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.random() * 0.01)
                    task.cancel()
                    await asyncio.wait([task])
                else:
                    await task
                    assert at(file, start, stop) == BODY[start:stop]

        await asyncio.gather(*[read(file) for file in files for _ in range(2)])
        await files[0].ensure(0, len(BODY))
        assert at(files[0], 0, len(BODY)) == BODY
        await fetcher.close()


# What is believed


async def failing(served, match, kind=MediaFetchError, num_requests=1, **config):
    async with serving(served) as site:
        fetcher = fetcher_for(site, **config)
        file = await opened(fetcher)
        num_before = len(site.requests)
        with pytest.raises(kind, match=match) as caught:
            await file.ensure(*blocks((10, 12))[0])
        assert len(site.requests) == num_before + num_requests
        assert not file.is_present(*blocks((10, 12))[0])
        for secret in ("127.0.0.1", PUBLIC, "Traceback", "/"):
            assert secret not in caught.value.message
        await fetcher.close()
        return caught.value


def replacing(answer):
    """A file whose parts are answered by ``answer(exchange, start, stop)``."""
    served = ServedFile(BODY)

    async def part(exchange, start, stop):
        await answer(exchange, start, stop)
        return True

    served.part = part
    return served


def part_with(headers, status=206, length=None):
    async def answer(exchange, start, stop):
        lines = headers.format(start=start, last=stop - 1, total=len(BODY))
        await exchange.answer(status, lines, BODY[start : stop if length is None else start + length])

    return replacing(answer)


GOOD = "Content-Range: bytes {start}-{last}/{total}\n"


@pytest.mark.parametrize(
    "served",
    [
        part_with(GOOD + 'ETag: "v2"'),
        part_with(GOOD + 'ETag: W/"v1"'),
        part_with(GOOD),
        part_with('Content-Range: bytes {start}-{last}/999999999\nETag: "v1"'),
        part_with('ETag: "v2"', 200),
        part_with("", 200),
        part_with("Content-Range: bytes */5", 416),
        part_with("", 412),
    ],
)
async def test_another_version_is_an_error(served):
    await failing(served, "changed on the media server while")


@pytest.mark.parametrize(
    ("served", "match"),
    [
        (part_with('Content-Range: bytes 0-{last}/{total}\nETag: "v1"'), "another part"),
        (part_with('Content-Range: bytes {start}-{start}/{total}\nETag: "v1"'), "another part"),
        (part_with('ETag: "v1"'), "which part"),
        (part_with('Content-Range: bytes {start}-{last}/*\nETag: "v1"'), "which part"),
        (part_with('Content-Type: multipart/byteranges\nETag: "v1"'), "which part"),
        (part_with(GOOD + 'ETag: "v1"\nContent-Encoding: gzip'), "which part"),
        (part_with('ETag: "v1"', 200), "only all of it"),
        (part_with("", 404), "status 404"),
        (part_with("", 503), "status 503"),
        (part_with("Location: http://10.0.0.1/x", 302), "status 302"),
        (part_with("", 304), "status 304"),
    ],
)
async def test_wrong_parts_are_errors(served, match):
    await failing(served, match)


async def test_more_than_was_asked_for_is_an_error():
    served = part_with(GOOD + 'ETag: "v1"', length=3 * BLOCK_BYTES)
    await failing(served, "more of the file than")


async def test_a_file_that_changes_is_noticed_and_stays_changed():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await ensured(file, 0, 10)
        served.body, served.etag = BODY[::-1], '"v2"'
        await file.wait_closed()
        file = SparseFile(fetcher._cache.get(URL).content)
        file.prefetch(blocks((50, 60)))
        waiting = [asyncio.ensure_future(file.ensure(*pair)) for pair in blocks((20, 21), (30, 31), (40, 41))]
        for task in waiting:
            with pytest.raises(MediaFetchError, match="changed"):
                await task
        num_requests = len(site.requests)
        with pytest.raises(MediaFetchError, match="changed"):
            await file.ensure(*blocks((62, 63))[0])
        assert len(site.requests) == num_requests
        await ensured(file, 0, 10)  # what came before is of one version
        # The next question gets the new version.
        new = await opened(fetcher)
        await new.ensure(0, 10)
        assert at(new, 0, 10) == BODY[::-1][:10]
        assert new.content_hash != file.content_hash
        await fetcher.close()


def breaking_off(num_times, num_bytes):
    """Ends the connection after ``num_bytes`` of a part, that many times."""
    served = ServedFile(BODY)

    async def part(exchange, start, stop):
        nonlocal num_times
        if num_times == 0:
            return False
        num_times -= 1
        if num_bytes:
            where = f"Content-Range: bytes {start}-{stop - 1}/{len(BODY)}"
            head = [
                "HTTP/1.1 206 Part",
                where,
                *served.fields().splitlines(),
                f"Content-Length: {stop - start}",
                "",
                "",
            ]
            await exchange.send("\r\n".join(head).encode() + BODY[start : start + num_bytes])
        raise ConnectionResetError

    served.part = part
    return served


@pytest.mark.parametrize("num_bytes", [0, 1000, BLOCK_BYTES + 1000])
async def test_a_server_that_breaks_off_is_asked_once_more_for_the_rest(num_bytes):
    served = breaking_off(1, num_bytes)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        start, stop = blocks((10, 13))[0]
        await ensured(file, start, stop)
        assert served.ranges == [(start, stop), (start + num_bytes, stop)]
        assert file.num_bytes_fetched == stop - start
        await fetcher.close()


async def test_a_server_that_breaks_off_twice_is_given_up():
    await failing(breaking_off(2, 1000), "broke off", num_requests=2)


async def test_a_part_that_ends_early_counts_as_broken_off():
    await failing(part_with(GOOD + 'ETag: "v1"', length=500), "broke off", num_requests=2)


async def test_what_failed_may_be_asked_for_again():
    served = breaking_off(2, 0)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        with pytest.raises(MediaFetchError, match="broke off"):
            await file.ensure(*blocks((10, 11))[0])
        await ensured(file, *blocks((10, 11))[0])
        await fetcher.close()


@pytest.mark.parametrize("num_bytes", [0, 100])
async def test_a_part_has_a_deadline(num_bytes):
    async def silent(exchange, start, stop):
        if num_bytes:
            head = (
                f'Content-Range: bytes {start}-{stop - 1}/{len(BODY)}\r\nETag: "v1"\r\nContent-Length: {stop - start}'
            )
            await exchange.send(f"HTTP/1.1 206 P\r\n{head}\r\n\r\n".encode())
            while True:
                await exchange.send(b"x")
                await asyncio.sleep(0.02)
        await asyncio.sleep(3600)

    error = await failing(replacing(silent), "0.4 seconds", fetch_timeout_seconds=0.4)
    assert error.code == "media_fetch_timeout"
    assert "--fetch-timeout-seconds" in error.message


async def test_each_connection_is_checked_anew():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site, FakeResolver(allowed_test=[[PUBLIC], [PUBLIC, "10.0.0.1"]]))
        file = await opened(fetcher)
        with pytest.raises(MediaBlockedError):
            await file.ensure(*blocks((10, 11))[0])
        assert served.ranges == []
        await fetcher.close()


async def test_bytes_fetched_in_vain_count_against_the_limit():
    async def always_short(exchange, start, stop):
        await exchange.answer(
            206, GOOD.format(start=start, last=stop - 1, total=len(BODY)) + 'ETag: "v1"', BODY[start:stop]
        )

    served = replacing(always_short)
    async with serving(served) as site:
        fetcher = fetcher_for(site, max_media_bytes=len(BODY))
        file = await opened(fetcher)
        file._counted.num_bytes_fetched = len(BODY) - 10  # as after many requests stopped half way
        with pytest.raises(MediaTooLargeError, match="--max-media-bytes"):
            await file.ensure(*blocks((10, 11))[0])
        await fetcher.close()


async def test_a_full_disk_is_not_the_requests_fault(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "/secret/path")

    async with serving(ServedFile(BODY)) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        with monkeypatch.context() as patch:
            patch.setattr(sparse_module.os, "pwrite", full)
            with pytest.raises(FilmstripError, match="stored here") as caught:
                await file.ensure(0, 10)
        assert caught.value.code == "storage_failed"
        assert "secret" not in caught.value.message
        await fetcher.close()
        fetcher = fetcher_for(site)
        with monkeypatch.context() as patch:
            patch.setattr(sparse_module.os, "ftruncate", full)
            with pytest.raises(FilmstripError, match="stored here"):
                await fetcher.fetch(URL, sparse=True)
        await fetcher.close()


# Keeping


async def test_the_second_question_fetches_only_what_is_missing():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await ensured(file, *blocks((10, 12))[0])
        assert fetcher.num_cached_bytes == 2 * BLOCK_BYTES
        await file.wait_closed()
        await settled(lambda: site.num_open == 0)
        file = await opened(fetcher)
        assert (served.num_whole, served.num_unchanged) == (1, 1)
        assert file.is_present(*blocks((10, 12))[0])
        served.ranges.clear()
        await ensured(file, *blocks((9, 13))[0])
        assert sorted(served.ranges) == blocks((9, 10), (12, 13))
        assert fetcher.stats.num_revalidated == 1
        await fetcher.close()


async def test_a_sparse_file_that_outgrows_the_cache_is_dropped_but_goes_on_for_its_reader():
    async with serving(ServedFile(BODY)) as site:
        fetcher = fetcher_for(site, download_cache_gb=3 * BLOCK_BYTES / 1024**3)
        file = await opened(fetcher)
        await ensured(file, *blocks((10, 12))[0])
        assert fetcher.num_cached_bytes == 2 * BLOCK_BYTES
        await ensured(file, *blocks((20, 22))[0])
        await settled(lambda: fetcher.num_cached_bytes == 0)
        await ensured(file, *blocks((30, 32))[0])
        await fetcher.close()


async def test_a_sync_fetch_does_not_get_parts_that_another_loop_fetches():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        source = await asyncio.to_thread(fetcher.fetch_sync, URL)
        assert isinstance(source, FileSource)
        assert source.num_bytes == len(BODY)
        await ensured(file, 0, 10)
        del source
        await fetcher.close()


# Ending


async def test_cancelling_a_waiter_stops_what_only_it_wanted():
    started, hold = asyncio.Event(), asyncio.Event()

    async def part(exchange, start, stop):
        started.set()
        if start == 10 * BLOCK_BYTES:
            await hold.wait()
        return False

    served = ServedFile(BODY)
    served.part = part
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await settled(lambda: site.num_open == 0)
        alone = asyncio.ensure_future(file.ensure(*blocks((10, 11))[0]))
        await started.wait()
        alone.cancel()
        await settled(lambda: not [task for task in asyncio.all_tasks() if "_transfer" in repr(task)])
        hold.set()
        await settled(lambda: site.num_open == 0)
        # Two want the same: one may leave.
        hold.clear()
        one, two = (asyncio.ensure_future(file.ensure(*blocks((10, 11))[0])) for _ in range(2))
        await settled(lambda: len(served.ranges) == 2)
        one.cancel()
        hold.set()
        await two
        assert served.ranges == blocks((10, 11), (10, 11))
        await fetcher.close()


async def test_who_begins_to_wait_while_a_request_is_stopped_gets_its_bytes():
    hold = asyncio.Event()

    async def part(exchange, start, stop):
        await hold.wait()
        return False

    served = ServedFile(BODY)
    served.part = part
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        first = asyncio.ensure_future(file.ensure(*blocks((10, 11))[0]))
        await settled(lambda: served.ranges)
        first.cancel()
        await asyncio.sleep(0)  # stopped, but not over
        second = asyncio.ensure_future(ensured(file, *blocks((10, 11))[0]))
        hold.set()
        await second
        assert first.cancelled()
        await fetcher.close()


@pytest.mark.parametrize("stage", ["queued", "connecting", "answer", "body"])
@pytest.mark.parametrize("how", ["close", "cancel", "drop", "fetcher"])
async def test_nothing_is_left_at_any_stage(stage, how):
    hold = asyncio.Event()

    async def part(exchange, start, stop):
        if stage == "body":
            head = (
                f'Content-Range: bytes {start}-{stop - 1}/{len(BODY)}\r\nETag: "v1"\r\nContent-Length: {stop - start}'
            )
            await exchange.send(f"HTTP/1.1 206 P\r\n{head}\r\n\r\nsome".encode())
        await hold.wait()
        return stage == "body"

    class Connecting(FakeNetwork):
        async def connect_tcp(self, *args, **options):
            if len(self.dialled) >= 1 and stage == "connecting":
                self.dialled.append(args[:2])
                await asyncio.sleep(3600)
            return await super().connect_tcp(*args, **options)

    served = ServedFile(BODY)
    served.part = part
    async with serving(served) as site:
        network = Connecting({(PUBLIC, 80): site.port})
        resolver = FakeResolver(allowed_test=[[PUBLIC]])
        fetcher = Fetcher(MediaConfig(fetch_timeout_seconds=20.0), resolver, network=network)
        file = await opened(fetcher)
        waiting = asyncio.ensure_future(file.ensure(*blocks((10, 12))[0]))
        file.prefetch(blocks((20, 21), (30, 31), (40, 41), (50, 51), (60, 61)))
        if stage != "queued":
            await settled(lambda: len(network.dialled) >= 4 if stage == "connecting" else len(served.ranges) >= 3)
        else:
            await asyncio.sleep(0)
        if how == "cancel" or how == "drop":
            waiting.cancel()
            await asyncio.wait([waiting])
            assert waiting.cancelled()
            if how == "cancel":
                await file.wait_closed()
        else:
            await (file.wait_closed() if how == "close" else fetcher.close())
            with pytest.raises(InterruptedError):
                await waiting
        del file, waiting
        gc.collect()
        await settled(lambda: not [task for task in asyncio.all_tasks() if "_transfer" in repr(task)])
        hold.set()
        await settled(lambda: site.num_open == 0)
        assert file_count(fetcher) == 0
        await fetcher.close()


def file_count(fetcher):
    """Readers of sparse files."""
    return sum(len(content._readers) for content in fetcher._sparse)


async def test_a_closed_file_says_so_and_another_reader_goes_on():
    async with serving(ServedFile(BODY)) as site:
        fetcher = fetcher_for(site)
        file, other = await opened(fetcher), await opened(fetcher)
        waiting = asyncio.ensure_future(file.ensure(*blocks((10, 11))[0]))
        shared = asyncio.ensure_future(ensured(other, *blocks((10, 11))[0]))
        await asyncio.sleep(0)
        file.close()
        file.close()
        with pytest.raises(InterruptedError):
            await waiting
        await shared
        assert (file.fd, file.num_bytes_fetched) == (-1, BLOCK_BYTES)
        for use in (lambda: file.is_present(0, 1), lambda: file.prefetch([]), file.open):
            with pytest.raises(InterruptedError):
                use()
        await fetcher.close()


async def test_a_closed_fetcher_fetches_nothing_more():
    async with serving(ServedFile(BODY)) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        await ensured(file, 0, 10)
        await fetcher.close()
        await ensured(file, 0, 10)
        with pytest.raises(InterruptedError):
            await file.ensure(*blocks((10, 11))[0])
        with pytest.raises(InterruptedError):
            file.prefetch(blocks((10, 11)))


async def test_nothing_more_is_asked_for_once_the_file_has_changed():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site)
        file = await opened(fetcher)
        served.etag = '"v2"'
        num_before = len(site.requests)
        waiting = [file.ensure(*pair) for pair in blocks(*[(number, number + 1) for number in range(0, 60, 2)])]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert {str(error) for error in errors} == {"the file changed on the media server while it was being read"}
        assert len(site.requests) - num_before <= MAX_CONNECTIONS
        await fetcher.close()


async def test_requests_at_the_same_time_share_one_file():
    served = ServedFile(BODY)
    async with serving(served) as site:
        fetcher = fetcher_for(site, download_cache_gb=0)
        files = await asyncio.gather(*[opened(fetcher) for _ in range(4)])
        assert (served.num_whole, fetcher.stats.num_shared, fetcher.stats.num_sparse) == (1, 3, 1)
        await asyncio.gather(*[ensured(file, *blocks((10, 12))[0]) for file in files])
        assert served.ranges == blocks((10, 12))
        await fetcher.close()


async def test_cancelling_the_first_request_leaves_nothing():
    class Slow(ServedFile):
        async def __call__(self, exchange):
            await asyncio.sleep(3600)

    async with serving(Slow(BODY)) as site:
        fetcher = fetcher_for(site)
        task = asyncio.ensure_future(fetcher.fetch(URL, sparse=True))
        await site.requested.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await fetcher.close()


async def test_redirects_to_the_file_are_followed_once():
    served = ServedFile(BODY)

    async def redirect(exchange):
        await exchange.answer(302, "Location: http://other.test/real.mp4")

    async with serving(redirect) as site, serving(served) as second:
        resolver = FakeResolver(allowed_test=[[PUBLIC]], other_test=[[OTHER_PUBLIC]])
        network = FakeNetwork({(PUBLIC, 80): site.port, (OTHER_PUBLIC, 80): second.port})
        fetcher = Fetcher(MediaConfig(), resolver, network=network)
        file = await opened(fetcher)
        await ensured(file, *blocks((10, 12))[0])
        await ensured(file, *blocks((20, 22))[0])
        assert len(site.requests) == 1
        assert all(request.startswith("GET /real.mp4 ") for request in second.requests)
        file = await opened(fetcher)
        assert (len(site.requests), served.num_unchanged) == (2, 1)
        assert file.is_present(*blocks((10, 12))[0])
        await fetcher.close()
