"""Attacks on downloads in parts: a server that begins well and lies, changes or leads elsewhere when parts are asked for."""

import asyncio
import contextlib
import re

import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError
from filmstrip.media.fetch import Fetcher
from filmstrip.media.loader import MediaLoader
from filmstrip.types import FramePlan, MediaItem, Modality
from tests.attacks.forge import boxes
from tests.attacks.harness import check_shows_nothing
from tests.attacks.internet import HOST, SECRET, Internet, Network
from tests.attacks.test_decoders import HEIGHT, LAYOUT, WIDTH, frames_of
from tests.media.clips import box
from tests.media.numbered import read_number
from tests.media.web import replying, serving

PADDING_BYTES = 20 * 1024**2
MAX_MEDIA_BYTES = 64 * 1024**2
TAG = 'ETag: "one"'


@pytest.fixture(scope="module")
def long_clip(clip):
    """A good clip whose index lies 20 MiB behind its frames: nobody would download it whole for two of them."""
    kinds = [kind for kind, _, _ in boxes(clip)]
    assert kinds[-1] == b"moov"
    start = boxes(clip)[-1][1]
    return clip[:start] + box(b"free", bytes(PADDING_BYTES)) + clip[start:]


class Parts:
    """A site that serves a file in parts; ``lie`` answers requests for parts instead, if it is set."""

    def __init__(self, data):
        self.data, self.lie, self.num_parts = data, None, 0

    async def __call__(self, exchange):
        wanted = re.search(r"^range: bytes=(\d+)-(\d+)", exchange.head, re.IGNORECASE | re.MULTILINE)
        if exchange.path == "/other":
            await exchange.answer(200, "Content-Type: text/plain", SECRET.encode() * 100)
        elif wanted is None:
            head = f"HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\n{TAG}\r\nContent-Length: {len(self.data)}\r\n\r\n"
            await exchange.send(head.encode() + self.data)
        else:
            self.num_parts += 1
            start, stop = int(wanted[1]), int(wanted[2]) + 1
            await (self.lie or honest)(exchange, self.data, start, min(stop, len(self.data)))


async def honest(exchange, data, start, stop):
    headers = f"Content-Range: bytes {start}-{stop - 1}/{len(data)}\n{TAG}"
    await exchange.answer(206, headers, data[start:stop])


def leading_to(url):
    async def lie(exchange, data, start, stop):
        await exchange.answer(302, f"Location: {url}")

    return lie


def saying(status, template, body=None, length=True):
    """Answers with headers in which {start}, {last} and {size} stand for the right numbers."""

    async def lie(exchange, data, start, stop):
        headers = template.format(start=start, last=stop - 1, size=len(data), far=start + 10**9)
        await exchange.answer(status, headers, data[start:stop] if body is None else body, length=length)

    return lie


async def endless(exchange, data, start, stop):
    await exchange.send(
        f"HTTP/1.1 206 Partial\r\nContent-Range: bytes {start}-{stop - 1}/{len(data)}\r\n{TAG}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    while True:
        await exchange.send(b"10000\r\n" + bytes(65536) + b"\r\n")


async def silent(exchange, data, start, stop):
    await asyncio.sleep(60)


async def dripping(exchange, data, start, stop):
    await exchange.send(
        f"HTTP/1.1 206 Partial\r\nContent-Range: bytes {start}-{stop - 1}/{len(data)}\r\n{TAG}\r\n"
        f"Content-Length: {stop - start}\r\n\r\n".encode()
    )
    while True:
        await exchange.send(b"\0")
        await asyncio.sleep(0.1)


async def breaking_off(exchange, data, start, stop):
    await exchange.send(
        f"HTTP/1.1 206 Partial\r\nContent-Range: bytes {start}-{stop - 1}/{len(data)}\r\n{TAG}\r\n"
        f"Content-Length: {stop - start}\r\n\r\n".encode()
        + data[start : start + 10]
    )
    raise ConnectionResetError


RANGE = "Content-Range: bytes {start}-{last}/{size}\n"
LIES = {
    "redirect-to-loopback": leading_to("http://127.0.0.1/x.mp4"),
    "redirect-to-metadata": leading_to("http://169.254.169.254/"),
    "redirect-to-file": leading_to("file:///etc/passwd"),
    "redirect-to-private-name": leading_to("http://private.test/"),
    "redirect-to-other-port": leading_to(f"http://{HOST}:8080/"),
    "redirect-to-itself": leading_to(f"http://{HOST}/long.mp4"),
    "redirect-elsewhere": leading_to(f"http://{HOST}/other"),
    "another-version": saying(206, RANGE + 'ETag: "two"'),
    "no-version": saying(206, RANGE),
    "weak-version": saying(206, RANGE + 'ETag: W/"one"'),
    "another-start": saying(206, "Content-Range: bytes 0-{last}/{size}\n" + TAG),
    "far-away": saying(206, "Content-Range: bytes {far}-{far}/{size}\n" + TAG),
    "another-size": saying(206, "Content-Range: bytes {start}-{last}/99999999999999\n" + TAG),
    "no-range": saying(206, TAG),
    "garbage-range": saying(206, "Content-Range: bytes -1--1/-1\n" + TAG),
    "other-unit": saying(206, "Content-Range: frames {start}-{last}/{size}\n" + TAG),
    "several-parts": saying(206, "Content-Type: multipart/byteranges; boundary=x\n" + TAG, b"--x\r\n\r\nabc\r\n--x--"),
    "gzip": saying(206, RANGE + TAG + "\nContent-Encoding: gzip"),
    "too-short": saying(206, RANGE + TAG, b"abc"),
    "too-long": saying(206, RANGE + TAG, bytes(5_000_000)),
    "empty": saying(206, RANGE + TAG, b""),
    "whole": saying(200, TAG, b"something else entirely"),
    "not-found": saying(404, TAG, SECRET.encode()),
    "no-such-range": saying(416, "Content-Range: bytes */{size}", b""),
    "server-error": saying(500, "", SECRET.encode()),
    "not-modified": saying(304, TAG, b""),
    "endless": endless,
    "silent": silent,
    "dripping": dripping,
    "breaking-off": breaking_off,
}


@contextlib.asynccontextmanager
async def loader_on(parts, clip, folder):
    """A loader for which the public site is ``parts`` and every other address a canary."""
    config = MediaConfig(
        num_decode_threads=2,
        allow_local_files=False,
        fetch_timeout_seconds=1.0,
        max_media_bytes=MAX_MEDIA_BYTES,
        download_cache_gb=0.0,
    )
    async with serving(parts) as site, serving(replying(clip, headers="Content-Type: video/mp4")) as canary:
        network = Network(site.port, site.port, canary.port)
        loader = MediaLoader(config, Fetcher(config, Internet(clip, folder).names, network=network))
        try:
            yield loader, canary
        finally:
            await loader.close()


async def load(loader, number):
    """The numbers in the first and the last frame."""
    item = MediaItem(Modality.VIDEO, url=f"http://{HOST}/long.mp4?{number}", param="messages[0]")
    opened = await loader.open(await loader.fetch(item))
    try:
        plan = FramePlan((0, opened.metadata.total_num_frames - 1), HEIGHT, WIDTH, LAYOUT)
        tensor, _ = await loader.read(opened, plan)
        return [read_number(frame) for frame in frames_of(tensor.array[:], plan)]
    finally:
        opened.close()


async def outcome_of(loading):
    """What it gives, or the error by which a request would be refused."""
    try:
        return await loading
    except InvalidRequestError as error:
        return error


async def test_no_lie_about_parts_leads_elsewhere_or_shows_wrong_frames(long_clip, clip, tmp_path):
    """One loader for all: what one server did must not harm the next download."""
    parts = Parts(long_clip)
    async with loader_on(parts, clip, tmp_path) as (loader, canary):
        for number, (name, lie) in enumerate(LIES.items()):
            parts.lie, parts.num_parts = lie, 0
            outcome = await asyncio.wait_for(outcome_of(load(loader, number)), 20)
            if isinstance(outcome, InvalidRequestError):
                check_shows_nothing(outcome.message)
                assert outcome.param == "messages[0]", name
            else:
                assert outcome == [0, 19], name
            assert parts.num_parts > 0, name
            assert canary.num_connections == 0, name
        parts.lie = None
        assert await load(loader, len(LIES)) == [0, 19]
