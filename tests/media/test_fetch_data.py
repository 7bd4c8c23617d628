"""``data:`` URLs: attack case A30 as far as bytes go."""

import base64
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError, MediaFetchError, MediaTooLargeError
from filmstrip.media import data_url
from filmstrip.media.data_url import decode_base64
from filmstrip.media.fetch import Fetcher
from filmstrip.media.frames import is_frames_url
from filmstrip.media.source import BytesSource, FileSource

PIXELS = bytes(range(256)) * 3
ENCODED = base64.b64encode(PIXELS).decode()


def read(source):
    with source.open() as file:
        return file.read()


def decode(text, max_bytes=10**6, max_memory_bytes=10**6):
    return decode_base64(text, 0, len(text), max_bytes=max_bytes, max_memory_bytes=max_memory_bytes)


@pytest.fixture
def fetcher():
    return Fetcher(MediaConfig(allow_local_files=False))


@pytest.mark.parametrize(
    "head",
    [
        "data:video/mp4;base64,",
        "DATA:Video/MP4;BASE64,",
        "data:;base64,",
        "data:image/png;name=x.png;base64,",
        "data:application/octet-stream;base64,",
        "data:text/csv;base64,",
        "data:audio/wav;base64,",
    ],
)
async def test_data_urls_are_read(fetcher, head):
    source = await fetcher.fetch(head + ENCODED)
    assert read(source) == PIXELS
    assert source.content_hash == BytesSource(PIXELS).content_hash


async def test_line_breaks_and_spaces_in_the_payload_are_skipped(fetcher):
    lines = "\r\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76))
    assert read(await fetcher.fetch(f"data:video/mp4;base64, {lines}\n")) == PIXELS


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:video/mp4;base64", "no comma"),
        ("data:", "no comma"),
        ("data:video/mp4," + ENCODED, ";base64 is missing"),
        ("data:video/mp4;base64x,AAAA", ";base64 is missing"),
        ("data:video/mp4;base64,", "empty"),
        ("data:video/mp4;base64, \n", "empty"),
        ("data:video/mp4;base64,AAAAA", "multiple of 4"),
        ("data:video/mp4;base64,AA", "multiple of 4"),
        ("data:video/mp4;base64,AA=", "multiple of 4"),
        ("data:video/mp4;base64,A===", "padding"),
        ("data:video/mp4;base64,====", "padding"),
        ("data:video/mp4;base64,AAAA====", "padding"),
        ("data:video/mp4;base64,AA==AAAA", "'='"),
        ("data:video/mp4;base64,AA-_", "URL-safe"),
        ("data:video/mp4;base64,AAA%3D", "percent-encoding"),
        ("data:video/mp4;base64,AAAA,AAAA", "frames"),
        ("data:video/mp4;base64,AA\0A", "character"),
        ("data:video/mp4;base64,AAé=", "ASCII"),
        ("data:video/mp4;base64,AA\ud800=", "ASCII"),
        ("data:text/html;base64,AAAA", "not media"),
        ("data:multipart/mixed;base64,AAAA", "not media"),
    ],
)
async def test_malformed_data_urls_are_errors(fetcher, url, message):
    with pytest.raises(MediaFetchError, match=message) as caught:
        await fetcher.fetch(url, param="p")
    assert caught.value.param == "p"
    assert len(caught.value.message) < 300


async def test_too_much_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(data_url.binascii, "a2b_base64", lambda *_: pytest.fail("decoded"))
    with pytest.raises(MediaTooLargeError, match="--max-media-bytes"):
        await Fetcher(MediaConfig(max_media_bytes=1000)).fetch("data:video/mp4;base64," + "A" * 4000)


async def test_the_limit_is_exact():
    url = "data:video/mp4;base64," + base64.b64encode(bytes(1000)).decode()
    assert read(await Fetcher(MediaConfig(max_media_bytes=1000)).fetch(url)) == bytes(1000)
    with pytest.raises(MediaTooLargeError):
        await Fetcher(MediaConfig(max_media_bytes=999)).fetch(url)


def test_large_payloads_go_to_a_file():
    source = decode(ENCODED, max_memory_bytes=100)
    assert isinstance(source, FileSource)
    assert read(source) == PIXELS


@given(st.binary(min_size=1, max_size=300), st.integers(1, 9), st.data())
def test_any_bytes_come_back_whatever_the_step_and_the_white_space(data, step, draw):
    text = base64.b64encode(data).decode()
    for position in draw.draw(st.lists(st.integers(0, len(text)), max_size=5)):
        text = text[:position] + draw.draw(st.sampled_from(" \t\r\n")) + text[position:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_url, "_STEP_CHARS", step)
        assert read(decode(text)) == data


@given(st.text(alphabet="AQz+/=- \n,", max_size=12), st.integers(1, 5))
def test_what_is_accepted_is_what_a_strict_decoder_accepts(text, step):
    stripped = "".join(text.split())
    try:
        # The standard library's validation lets surplus padding pass; re-encoding shows it.
        expected = base64.b64decode(stripped, validate=True)
        valid = len(base64.b64encode(expected)) == len(stripped) and expected != b""
    except ValueError:
        expected, valid = b"", False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_url, "_STEP_CHARS", step)
        if valid:
            assert read(decode(text)) == expected
        else:
            with pytest.raises(MediaFetchError):
                decode(text)


def test_decoding_can_be_cancelled():
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(InterruptedError):
        decode_base64(ENCODED, 0, len(ENCODED), max_bytes=10**6, max_memory_bytes=10**6, cancel=cancel)


def test_a_full_disk_is_not_the_requests_fault(monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    monkeypatch.setattr("filmstrip.media.fetch.MAX_MEMORY_BYTES", 10)
    with pytest.raises(FilmstripError) as caught:
        Fetcher(MediaConfig()).fetch_sync("data:video/mp4;base64," + ENCODED)
    assert (caught.value.http_status, caught.value.code) == (500, "storage_failed")
    assert "secret" not in caught.value.message


# Frames sampled by the client


def test_frame_urls_are_told_from_others():
    for kind in ("jpeg", "JPG", "png", "webp"):
        assert is_frames_url(f"data:video/{kind};base64,AAAA,BBBB")
    assert is_frames_url("DATA:video/jpeg;charset=x;base64,AAAA")
    for url in (
        "data:video/mp4;base64,AAAA",
        "data:image/jpeg;base64,AAAA",
        "video/jpeg;base64,AAAA",
        "http://x/data:",
    ):
        assert not is_frames_url(url)


async def test_frames_are_split_at_commas(fetcher):
    frames = [bytes([n]) * (n + 1) for n in range(20)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    assert [read(source) for source in await fetcher.fetch_frames(url)] == frames
    assert [read(source) for source in fetcher.fetch_frames_sync(url)] == frames


@pytest.mark.parametrize(
    ("payload", "message"),
    [("", "frame 0.*empty"), ("AAAA,", "frame 1.*empty"), ("AAAA,,AAAA", "frame 1.*empty"), ("AAAA,A", "frame 1")],
)
async def test_a_missing_or_broken_frame_is_named(fetcher, payload, message):
    with pytest.raises(MediaFetchError, match=message):
        await fetcher.fetch_frames("data:video/jpeg;base64," + payload)


async def test_a_million_frames_are_refused_undecoded(fetcher, monkeypatch):
    monkeypatch.setattr(data_url.binascii, "a2b_base64", lambda *_: pytest.fail("decoded"))
    with pytest.raises(MediaTooLargeError, match=r"1000000 frames; the limit is 2048 .*--max-video-frames"):
        await fetcher.fetch_frames("data:video/jpeg;base64," + ",".join(["AAAA"] * 10**6), param="p")


async def test_frames_share_one_byte_limit():
    fetcher = Fetcher(MediaConfig(max_media_bytes=1000))
    with pytest.raises(MediaTooLargeError, match="--max-media-bytes"):
        await fetcher.fetch_frames("data:video/jpeg;base64," + ",".join(["A" * 400] * 5))
