"""The loader: every kind of item from URL or object to patches, wrong kinds, sharing of threads, cancelling, closing."""

import asyncio
import base64
import dataclasses
import io
import wave

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from filmstrip.config import MediaConfig
from filmstrip.errors import (
    InvalidRequestError,
    MediaBlockedError,
    MediaDecodeError,
    MediaError,
    MediaFetchError,
    MediaTooLargeError,
)
from filmstrip.media.fetch import Fetcher
from filmstrip.media.frames import is_presampled
from filmstrip.media.loader import MediaLoader
from filmstrip.types import FramePlan, FrameTiming, ImageMetadata, MediaItem, Modality, PatchLayout, VideoMetadata
from tests.media.web import replying, serving

LAYOUT = PatchLayout(patch_size=4, temporal_patch_size=2, merge_size=2)
HEIGHT, WIDTH = 32, 48
NUM_FRAMES = 20


def shades(num_frames=NUM_FRAMES):
    """Frames (T, H, W, 3), each of one grey that grows with time."""
    return np.broadcast_to(
        (10 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, HEIGHT, WIDTH, 3)
    ).copy()


def picture(array, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


def make_video(with_video=True, with_audio=False):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        if with_video:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for frame in shades():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        if with_audio:
            stream = container.add_stream("aac", rate=44100, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def clip():
    """Bytes of a small mp4 of :func:`shades`, 10 fps."""
    return make_video()


def data_url(media_type, data):
    parts = data if isinstance(data, list) else [data]
    return f"data:{media_type};base64," + ",".join(base64.b64encode(part).decode() for part in parts)


def image_item(url=None, **options):
    return MediaItem(Modality.IMAGE, url=url, param="messages[0].content[1].image_url", **options)


def video_item(url=None, **options):
    return MediaItem(Modality.VIDEO, url=url, param="messages[0].content[0].video_url", **options)


def series_item(url=None, **options):
    return MediaItem(Modality.TIME_SERIES, url=url, param="messages[0].content[0].time_series_url", **options)


def plan_of(*frame_indices, height=16, width=24):
    return FramePlan(frame_indices, height, width, LAYOUT)


@pytest.fixture
async def loader():
    loader = MediaLoader(MediaConfig(num_decode_threads=2, max_image_pixels=100_000, max_video_frames=32))
    yield loader
    await loader.close()


async def load(loader, item, plan):
    """All three steps; patches as (groups, rows, columns)."""
    opened = await loader.open(await loader.fetch(item))
    try:
        patches, indices = await loader.read(opened, plan)
    finally:
        opened.close()
    assert patches.shape == plan.patches_shape
    return opened.metadata, patches.array, indices


# Every kind of item


@pytest.mark.parametrize("way", ["data", "path", "file", "http"])
async def test_videos_are_loaded_from_everywhere(clip, tmp_path, way):
    (tmp_path / "clip.mp4").write_bytes(clip)
    async with serving(replying(clip)) as site:
        url = {
            "data": data_url("video/mp4", clip),
            "path": str(tmp_path / "clip.mp4"),
            "file": f"file://{tmp_path}/clip.mp4",
            "http": f"http://127.0.0.1:{site.port}/clip.mp4",
        }[way]
        loader = MediaLoader(MediaConfig(num_decode_threads=2, allow_private_media_urls=True))
        metadata, patches, indices = await load(loader, video_item(url), plan_of(0, 7, 19))
        await loader.close()
    assert isinstance(metadata, VideoMetadata)
    assert (metadata.total_num_frames, metadata.height, metadata.width) == (NUM_FRAMES, HEIGHT, WIDTH)
    assert metadata.timestamps[7] == pytest.approx(0.7)
    assert indices == (0, 7, 19)
    # Groups of two frames: (0, 7) and (19, 19); a patch row is channel, frame, 4 x 4 pixels.
    greys = patches.reshape(2, -1, 3, 2, 16).mean(axis=(1, 2, 4))
    np.testing.assert_allclose(greys, [[0, 70], [190, 190]], atol=4)


async def test_images_are_loaded_and_shown_twice(loader):
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    for item in (
        image_item(data_url("image/png", picture(array))),
        image_item(data_url("application/octet-stream", picture(array))),
        image_item(data=array),
        image_item(data=Image.fromarray(array)),
    ):
        metadata, patches, indices = await load(loader, item, plan_of(0))
        assert isinstance(metadata, ImageMetadata)
        assert (metadata.height, metadata.width, indices) == (16, 24, (0,))
        # rows: block row, block column, row and column in the block; columns: channel, frame, patch row and column
        rows = patches.reshape(2, 3, 2, 2, 3, 2, 4, 4)
        for frame in range(2):
            shown = rows[:, :, :, :, :, frame].transpose(0, 2, 5, 1, 3, 6, 4).reshape(16, 24, 3)
            assert (shown == array).all()


async def test_images_are_turned_before_they_are_measured(loader):
    exif = Image.Exif()
    exif[0x0112] = 6
    item = image_item(data_url("image/jpeg", picture(np.zeros((10, 20, 3), np.uint8), "JPEG", exif=exif)))
    opened = await loader.open(await loader.fetch(item))
    assert (opened.metadata.height, opened.metadata.width) == (20, 10)


@pytest.mark.parametrize("kind", ["jpeg", "array"])
async def test_frames_of_the_client_are_a_video(loader, kind):
    if kind == "jpeg":
        item = video_item(data_url("video/jpeg", [picture(frame, "JPEG") for frame in shades()]))
    else:
        item = video_item(data=shades())
    item = dataclasses.replace(item, timing=FrameTiming(fps=4))
    metadata, patches, indices = await load(loader, item, plan_of(1, 1, 5, 19))
    assert (metadata.total_num_frames, metadata.fps, metadata.video_backend) == (NUM_FRAMES, 4, "frames")
    assert indices == (1, 1, 5, 19)
    greys = patches.reshape(2, -1, 3, 2, 16).mean(axis=(1, 2, 4))
    np.testing.assert_allclose(greys, [[10, 10], [50, 190]], atol=1)


async def test_items_load_at_the_same_time(loader, clip):
    items = [video_item(data_url("video/mp4", clip)), image_item(data=shades()[3]), video_item(data=shades(3))] * 4
    results = await asyncio.gather(*[load(loader, item, plan_of(0)) for item in items])
    assert [metadata.__class__ for metadata, _, _ in results] == [VideoMetadata, ImageMetadata, VideoMetadata] * 4


def test_presampled_items_are_known():
    assert is_presampled(video_item("data:video/jpeg;base64,AAAA,BBBB"))
    assert is_presampled(video_item(data=shades()))
    assert is_presampled(video_item(frame_urls=("a.jpg", "b.jpg")))
    assert not is_presampled(video_item("data:video/mp4;base64,AAAA"))
    assert not is_presampled(video_item("clip.mp4"))
    assert not is_presampled(image_item(data=shades()[0]))


async def test_frames_at_urls_of_their_own_are_a_video_with_the_times_given(loader, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(shades()[5 * i]))
    urls = (str(tmp_path / "0.png"), (tmp_path / "1.png").as_uri(), data_url("image/png", picture(shades()[10])))
    item = video_item(frame_urls=urls, timing=FrameTiming(timestamps=(0.5, 1.25, 4.0)))
    metadata, patches, indices = await load(loader, item, plan_of(0, 1, 2))
    assert metadata.timestamps.tolist() == [0.5, 1.25, 4.0]
    assert not metadata.timing_assumed
    assert indices == (0, 1, 2)
    expected = await load(loader, video_item(data=shades()[[0, 5, 10]], timing=item.timing), plan_of(0, 1, 2))
    np.testing.assert_array_equal(patches, expected[1])


SERIES = np.arange(24, dtype=np.float64).reshape(12, 2) / 7


@pytest.mark.parametrize("way", ["npy", "fortran", "csv", "wav", "array"])
async def test_a_time_series_comes_through_a_worker_as_it_was_written(loader, way):
    data = SERIES
    if way != "array":
        file = io.BytesIO()
        if way == "csv":
            np.savetxt(file, SERIES, delimiter=",", fmt="%.17g")
        elif way == "wav":
            soundfile.write(file, SERIES / 4, 50, format="WAV", subtype="FLOAT")
        else:
            np.save(file, SERIES if way == "npy" else np.asfortranarray(SERIES))
        item = series_item(data_url("", file.getvalue()), sampling_rate=None if way == "wav" else 50.0)
        data = SERIES / 4 if way == "wav" else SERIES
    else:
        item = series_item(data=SERIES, sampling_rate=50.0)
    opened = await loader.open(await loader.fetch(item))
    assert opened.metadata.duration == 12 / 50
    samples = await loader.read_samples(opened)
    opened.close()
    np.testing.assert_array_equal(samples.array, data.astype(np.float32))
    assert loader.worker_stats.num_started == (0 if way == "array" else 1)


async def test_faults_behind_the_header_of_a_time_series_are_found_when_it_is_read(loader):
    opened = await loader.open(await loader.fetch(series_item(data_url("text/csv", b"1,2\n3,x\n"))))
    with pytest.raises(MediaDecodeError, match="row 2, column 2 of the table is not a number") as caught:
        await loader.read_samples(opened)
    assert caught.value.param == opened.item.param


async def test_a_rate_that_cannot_be_is_refused_before_anything_is_fetched(loader):
    with pytest.raises(InvalidRequestError, match="sampling_rate must be a number"):
        await loader.fetch(series_item("http://127.0.0.1:1/", sampling_rate=0.0))


# Hashes


async def test_hashes_follow_bytes_and_times(loader, clip, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip)

    async def hash_of(item):
        return (await loader.fetch(item)).content_hash

    assert await hash_of(video_item(data_url("video/mp4", clip))) == await hash_of(
        video_item(str(tmp_path / "clip.mp4"))
    )
    assert await hash_of(video_item(data_url("video/mp4", clip))) != await hash_of(
        video_item(data_url("video/mp4", clip + b"x"))
    )
    frames = video_item(data_url("video/jpeg", [picture(frame, "JPEG") for frame in shades(3)]))
    swapped = video_item(data_url("video/jpeg", [picture(frame, "JPEG") for frame in shades(3)[::-1]]))
    later = dataclasses.replace(frames, timing=FrameTiming(fps=1, frames_indices=(1, 2, 3)))
    array = video_item(data=shades(3))
    hashes = [
        await hash_of(item) for item in (frames, swapped, later, array, dataclasses.replace(array, timing=later.timing))
    ]
    assert len(set(hashes)) == len(hashes)
    assert await hash_of(array) == await hash_of(video_item(data=np.asfortranarray(shades(3))))
    assert await hash_of(image_item(data=shades()[0])) != await hash_of(
        image_item(data=shades()[0].reshape(WIDTH, HEIGHT, 3))
    )


async def test_the_number_of_bytes_is_known(loader, clip):
    assert (await loader.fetch(video_item(data_url("video/mp4", clip)))).num_bytes == len(clip)
    frames = [picture(frame, "JPEG") for frame in shades(3)]
    assert (await loader.fetch(video_item(data_url("video/jpeg", frames)))).num_bytes == sum(map(len, frames))


# Wrong items


def sound():
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 8000, 0, "NONE", ""))
        writer.writeframes(bytes(1000))
    return file.getvalue()


PNG = picture(shades(1)[0])
BROKEN = [
    (
        image_item("data:video/mp4;base64,AAAA"),
        MediaDecodeError,
        "type video/mp4 in a part of type image_url; send it as video_url",
    ),
    (image_item("data:video/jpeg;base64,AAAA,AAAA"), MediaDecodeError, "type video/jpeg .*video_url"),
    (
        video_item("data:image/png;base64,AAAA"),
        MediaDecodeError,
        "type image/png in a part of type video_url; send it as image_url",
    ),
    (video_item("data:audio/wav;base64,AAAA"), MediaDecodeError, "type audio/wav in"),
    (video_item("data:text/html;base64,AAAA"), MediaError, "text/html"),
    (video_item(data_url("video/mp4", PNG)), MediaDecodeError, "a PNG image, not a video; send it as image_url"),
    (video_item(data_url("video/mp4", sound())), MediaDecodeError, "a WAV file: it has no video"),
    (video_item(data_url("", bytes(500))), MediaDecodeError, "cannot be read"),
    (video_item(data_url("", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x\n")), MediaDecodeError, "text"),
    (video_item(data_url("", b"ffconcat version 1.0\nfile /etc/passwd\n")), MediaDecodeError, "text"),
    (video_item(data_url("", b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n")), MediaDecodeError, "text"),
    (image_item(data_url("", b"#EXTM3U\n")), MediaDecodeError, "text"),
    (video_item("/no/such/clip.mp4"), MediaFetchError, "no such file"),
    (video_item("http://127.0.0.1:1/"), MediaBlockedError, "--allow-private-media-urls"),
    (video_item("data:video/jpeg;base64,AAAA,AAAA,"), MediaFetchError, "frame 2"),
    (video_item(data_url("video/jpeg", [PNG] * 33)), MediaTooLargeError, "33 frames; the limit is 32"),
    (video_item(data=np.zeros((33, 2, 2, 3), np.uint8)), MediaTooLargeError, "33 frames; the limit is 32"),
    (
        video_item(data_url("video/jpeg", [PNG, picture(np.zeros((2, 2, 3), np.uint8))])),
        MediaDecodeError,
        "differ in size",
    ),
    (video_item(data_url("video/png", [PNG]), timing=FrameTiming(fps=0)), InvalidRequestError, "fps"),
    (video_item(data=shades(2), timing=FrameTiming(frames_indices=(1,))), InvalidRequestError, "frames_indices"),
    (image_item(data=np.zeros((400, 400, 3), np.uint8)), MediaTooLargeError, "--max-image-pixels"),
    (
        image_item(data_url("image/png", picture(np.zeros((400, 400, 3), np.uint8)))),
        MediaTooLargeError,
        "--max-image-pixels",
    ),
    (image_item(data="text"), MediaDecodeError, "numpy array"),
    (video_item(data=[1]), MediaDecodeError, "numpy array"),
    (
        series_item(data_url("image/png", PNG)),
        MediaDecodeError,
        "type image/png in a part of type time_series_url; send",
    ),
    (series_item(data_url("", PNG)), MediaDecodeError, "a PNG image, not a time series; send it as image_url"),
    (series_item(data_url("text/csv", b"x,y\n")), MediaDecodeError, "no numbers"),
    (series_item(data=[1.0]), MediaDecodeError, "must be a numpy array, not list"),
    (series_item(data=np.array([np.nan])), MediaDecodeError, "is not finite"),
    (series_item("/no/such/series.npy"), MediaFetchError, "no such file"),
]


@pytest.mark.parametrize(("item", "kind", "message"), BROKEN, ids=range(len(BROKEN)))
async def test_wrong_items_are_refused_with_their_param(loader, item, kind, message):
    with pytest.raises(kind, match=message) as caught:
        await loader.open(await loader.fetch(item))
    assert caught.value.param == item.param


async def test_videos_in_image_parts_and_sound_without_pictures_are_refused(loader, clip):
    for item, message in [
        (image_item(data_url("", clip)), "MP4 video, not an image; send it as video_url"),
        (video_item(data_url("", make_video(with_video=False, with_audio=True))), "no video stream"),
        (video_item(data_url("", clip[:24])), "video"),
    ]:
        with pytest.raises(MediaDecodeError, match=message) as caught:
            await loader.open(await loader.fetch(item))
        assert caught.value.param == item.param


@pytest.mark.parametrize("head", [b"", b"\x00", b"\xff\xfe"])
async def test_playlists_open_nothing(loader, clip, tmp_path, head):
    (tmp_path / "clip.mp4").write_bytes(clip)
    async with serving(replying(clip)) as site:
        url = f"http://127.0.0.1:{site.port}/clip.mp4"
        for playlist in (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile '{url}'\n",
            f"ffconcat version 1.0\nfile '{tmp_path}/clip.mp4'\n",
            f"<?xml?><MPD profiles='urn:mpeg:dash:profile:isoff-live:2011'><Period><AdaptationSet><Representation>"
            f"<BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>",
            f"concat:{tmp_path}/clip.mp4",
        ):
            with pytest.raises(MediaDecodeError):
                await loader.open(await loader.fetch(video_item(data_url("video/mp4", head + playlist.encode()))))
        assert site.num_connections == 0


async def test_errors_while_reading_have_the_param_too(loader):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    item = image_item(data_url("image/png", picture(noise)[:-2000]))
    opened = await loader.open(await loader.fetch(item))
    with pytest.raises(MediaDecodeError, match="broken or cut off") as caught:
        await loader.read(opened, plan_of(0))
    assert caught.value.param == item.param


async def test_the_next_item_works_after_a_wrong_one(loader, clip):
    for item, kind, _ in BROKEN:
        with pytest.raises(kind):
            await loader.open(await loader.fetch(item))
    assert (await load(loader, video_item(data_url("video/mp4", clip)), plan_of(0)))[2] == (0,)


# Closing, seams


async def test_reading_a_closed_item_is_an_error(loader, clip):
    opened = await loader.open(await loader.fetch(video_item(data_url("video/mp4", clip))))
    opened.close()
    with pytest.raises(InterruptedError):
        await loader.read(opened, plan_of(0))


async def test_a_fetcher_can_be_given(clip):
    class OneClip(Fetcher):
        async def fetch(self, url, *, param=None, sparse=False):
            return await super().fetch(data_url("video/mp4", clip))

    loader = MediaLoader(MediaConfig(num_decode_threads=1), OneClip(MediaConfig()))
    assert (await loader.fetch(video_item("http://anything.test/"))).num_bytes == len(clip)
    await loader.close()
