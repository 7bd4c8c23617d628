"""Files of which only parts are fetched: the same frames as from the whole file, by workers that ask for what they read."""

import asyncio
import contextlib
import re
import socket
import struct
import subprocess

import numpy as np
import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaDecodeError, MediaFetchError
from filmstrip.media import fetch
from filmstrip.media.loader import MediaLoader
from filmstrip.media.remote import RangeServer
from filmstrip.media.sparse import SparseFile
from filmstrip.types import FramePlan, MediaItem, Modality, PatchLayout
from tests.media.clips import remux
from tests.media.numbered import encode, has_encoder
from tests.media.web import serving

LAYOUT = PatchLayout(4, 2, 2)
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-b:v", "4M")
NUM_FRAMES = 300


def noisy(path, *arguments, **clip):
    """Clips large enough that parts of them are less than the whole."""
    return encode(path, "-vf", "noise=alls=40:allf=t", *arguments, num_frames=NUM_FRAMES, width=320, height=192, **clip)


CLIPS = {
    "h264": (*X264, "-g", "30", "-bf", "2"),
    "faststart": (*X264, "-g", "30", "-movflags", "+faststart"),
    "open_gop": (*X264, "-g", "30", "-bf", "3", "-x264-params", "open-gop=1"),
    "interlaced": (*X264, "-g", "30", "-flags", "+ilme+ildct"),
    "hevc": ("-c:v", "libx265", "-preset", "ultrafast", "-b:v", "4M", "-x265-params", "log-level=error:keyint=30"),
    "vp9": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "4M", "-g", "30"),
    "mpeg4": ("-c:v", "mpeg4", "-b:v", "4M", "-g", "30", "-bf", "2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


def clip_of(folder, kind):
    """A clip by name, made once."""
    path = folder / f"{kind}.mp4"
    if path.exists():
        return path
    if kind == "edit_list":
        return remux_from(folder, path, "-ss", "2.5")
    if kind == "mkv":
        return remux(clip_of(folder, "h264"), folder / "clip.mkv")
    if kind == "fragmented":
        return remux(clip_of(folder, "h264"), path, "-movflags", "frag_keyframe+empty_moov")
    return noisy(path, *CLIPS[kind])


def remux_from(folder, path, *arguments):
    """A copy that begins between two key frames, which an edit list hides."""
    source = clip_of(folder, "h264")
    subprocess.run(["ffmpeg", "-v", "error", "-y", *arguments, "-i", source, "-c", "copy", path], check=True)
    return path


class Media:
    """A file on a server that knows ranges; ``ranges`` has what was asked for."""

    def __init__(self, data):
        self.data, self.etag, self.ranges = data, '"v1"', []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, exchange):
        wanted = re.search(r"[Rr]ange: bytes=(\d+)-(\d+)", exchange.head)
        if f"if-none-match: {self.etag}" in exchange.head.lower():
            await exchange.answer(304, f"ETag: {self.etag}", length=False)
            return
        if not wanted:
            headers = f"ETag: {self.etag}\nAccept-Ranges: bytes\nContent-Length: {len(self.data)}"
            await exchange.answer(200, headers, self.data, length=False)
            return
        await self.may_answer.wait()
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(self.data))
        self.ranges.append((start, stop))
        headers = f"ETag: {self.etag}\nContent-Range: bytes {start}-{stop - 1}/{len(self.data)}"
        await exchange.answer(206, headers, self.data[start:stop])

    @property
    def num_bytes(self):
        return sum(stop - start for start, stop in self.ranges)


@contextlib.asynccontextmanager
async def loading(monkeypatch, **options):
    monkeypatch.setattr(fetch, "MIN_SPARSE_BYTES", 50_000)
    loader = MediaLoader(MediaConfig(num_decode_threads=2, allow_private_media_urls=True, **options))
    try:
        yield loader
    finally:
        await loader.close()


def item(url):
    return MediaItem(Modality.VIDEO, url=str(url), param="messages[0].content[0].video_url")


async def load(loader, url, *frame_indices):
    fetched = await loader.fetch(item(url))
    opened = await loader.open(fetched)
    try:
        patches, delivered = await loader.read(opened, FramePlan(frame_indices, 48, 80, LAYOUT))
    finally:
        opened.close()
    return fetched, opened.metadata, patches.array, delivered


@pytest.mark.parametrize("kind", [*CLIPS, "edit_list", "mkv", "fragmented"])
async def test_parts_give_the_same_frames_as_the_whole(folder, kind, monkeypatch):
    if kind == "hevc" and not has_encoder("libx265"):
        pytest.skip("this ffmpeg has no libx265")
    path = clip_of(folder, kind)
    media = Media(path.read_bytes())
    async with loading(monkeypatch) as loader, serving(media) as site:
        for indices in ((0, 1, 2), (100, 101, 130), (224,), (5, 120, 220)):
            _, whole, expected, delivered = await load(loader, path, *indices)
            fetched, metadata, patches, got = await load(loader, f"http://127.0.0.1:{site.port}/{kind}", *indices)
            assert isinstance(fetched.content, SparseFile)
            assert got == delivered == indices
            assert (patches == expected).all()
            assert np.array_equal(metadata.timestamps, whole.timestamps)
            assert vars(metadata) | {"timestamps": 0} == vars(whole) | {"timestamps": 0}


@pytest.mark.parametrize("kind", ["h264", "faststart", "hevc", "vp9"])
async def test_only_the_groups_of_wanted_frames_are_fetched(folder, kind, monkeypatch):
    if kind == "hevc" and not has_encoder("libx265"):
        pytest.skip("this ffmpeg has no libx265")
    path = clip_of(folder, kind)
    media = Media(path.read_bytes() + bytes([0, 0, 0, 8]) + b"free")
    async with loading(monkeypatch) as loader, serving(media) as site:
        _, _, _, delivered = await load(loader, f"http://127.0.0.1:{site.port}/clip", 271)
        assert delivered == (271,)
        assert media.num_bytes < 0.6 * len(media.data)
        num_requests = len(media.ranges)
        # The same part again: what is here is not fetched again.
        await load(loader, f"http://127.0.0.1:{site.port}/clip", 270, 271)
        assert media.ranges[num_requests:] == []


async def test_a_file_that_changes_meanwhile_is_an_error_and_not_a_mixture(folder, monkeypatch):
    media = Media(clip_of(folder, "h264").read_bytes())
    async with loading(monkeypatch) as loader, serving(media) as site:
        url = f"http://127.0.0.1:{site.port}/clip"
        opened = await loader.open(await loader.fetch(item(url)))
        media.etag = '"v2"'
        with pytest.raises(MediaFetchError, match="changed") as caught:
            await loader.read(opened, FramePlan((271,), 48, 80, LAYOUT))
        assert caught.value.param == item(url).param
        opened.close()
        _, _, _, delivered = await load(loader, url, 271)
        assert delivered == (271,)


async def test_cancelling_stops_the_download(folder, monkeypatch):
    media = Media(clip_of(folder, "h264").read_bytes())
    async with loading(monkeypatch) as loader, serving(media) as site:
        fetched = await loader.fetch(item(f"http://127.0.0.1:{site.port}/clip"))
        opened = await loader.open(fetched)
        media.may_answer.clear()
        read = asyncio.create_task(loader.read(opened, FramePlan((271,), 48, 80, LAYOUT)))
        await asyncio.sleep(0.3)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        opened.close()
        content = fetched.content._content
        assert not content._waiters
        await content.wait_idle()
        assert not content._running
        media.may_answer.set()
        _, _, _, delivered = await load(loader, f"http://127.0.0.1:{site.port}/clip", 271)
        assert delivered == (271,)


class WholeFile:
    """A partial file that has all parts."""

    def __init__(self, num_bytes):
        self.num_bytes, self.asked = num_bytes, []

    async def ensure(self, start, stop):
        self.asked.append((start, stop))

    def prefetch(self, ranges):
        self.asked.extend(ranges)

    def close(self):
        self.asked.append("closed")


@pytest.mark.parametrize("wanted", [(0, 101), (50, 40), (2**63, 2**64 - 1)])
async def test_a_worker_that_asks_for_what_is_not_there_is_refused(wanted):
    ours, theirs = socket.socketpair()
    file = WholeFile(100)
    server = RangeServer(file, ours)
    with theirs:
        theirs.sendall(struct.pack("<QQ?", 0, 100, True) + struct.pack("<QQ?", *wanted, True))
        with pytest.raises(MediaDecodeError):
            await server.failed
        server.close()
        server.close()
    assert file.asked == [(0, 100), "closed", "closed"]
