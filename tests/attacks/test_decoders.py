"""Attack cases A40 to A42: files that lie, files that refer to others, codecs that careless decoders show as black."""

import asyncio
import base64
import functools
import http.server
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError
from filmstrip.media.loader import MediaLoader
from filmstrip.types import FramePlan, MediaItem, Modality, PatchLayout
from tests.attacks import forge
from tests.attacks.forge import X264, clip, picture, set_u32
from tests.attacks.harness import Case, attacks, data_url, question
from tests.attacks.open_watch import OpenWatch
from tests.media.numbered import has_encoder, read_number

WIDTH, HEIGHT = 160, 96
LAYOUT = PatchLayout(16, 2, 2)
MOST = 2**32 - 1

Maker = Callable[[Path, bytes], bytes]


def deep_boxes(depth):
    """Boxes inside boxes."""
    return functools.reduce(lambda inner, _: forge.box(b"moov", inner), range(depth), b"")


def part_of(data, *kinds):
    """The outermost boxes of these kinds only."""
    return b"".join(data[start:end] for kind, start, end in forge.boxes(data) if kind in kinds)


REFUSED: dict[str, tuple[Maker, str]] = {
    "A40-no-moov": (lambda _, good: part_of(good, b"ftyp", b"mdat"), ""),
    "A40-moov-only": (lambda _, good: part_of(good, b"ftyp", b"moov"), "no frame"),
    "A40-cut-in-moov": (lambda _, good: good[: len(good) - 300], ""),
    "A40-cut-early": (lambda _, good: good[:100], ""),
    "A40-random": (lambda *_: np.random.default_rng(4).bytes(20_000), ""),
    "A40-random-behind-ftyp": (lambda _, good: good[:32] + np.random.default_rng(4).bytes(20_000), ""),
    "A40-zeros": (lambda *_: bytes(100_000), ""),
    "A40-one-byte": (lambda *_: b"\0", ""),
    "A40-text": (lambda *_: b"This is no film.\n" * 100, "text"),
    "A40-html": (lambda *_: b"<!doctype html><html><body>film</body></html>", "text"),
    "A40-pdf": (lambda *_: b"%PDF-1.7\n" + bytes(500), "PDF"),
    "A40-zip": (lambda *_: b"PK\x03\x04" + bytes(500), "ZIP"),
    "A40-png-in-a-video": (lambda *_: picture(), "image_url"),
    "A40-jpeg-in-a-video": (lambda *_: picture(format="JPEG"), "image_url"),
    "A40-sound-only-mp4": (lambda folder, _: forge.sound(folder, "sound.mp4", "-c:a", "aac"), "no video"),
    "A40-sound-only-mkv": (lambda folder, _: forge.sound(folder, "sound.mkv", "-c:a", "flac"), "no video"),
    "A40-sound-only-wav": (lambda folder, _: forge.sound(folder, "sound.wav"), "no video"),
    "A40-cover-only": (lambda folder, _: forge.sound_with_cover(folder), "cover"),
    "A40-65535-header": (lambda *_: forge.with_external_data("x", width=65535, height=65535), ""),
    "A40-sample-table-of-4-billion": (lambda _, good: set_u32(good, b"stsz", 8, MOST), ""),
    "A40-times-of-4-billion": (lambda _, good: set_u32(good, b"stts", 4, MOST), ""),
    "A40-chunks-of-4-billion": (lambda _, good: set_u32(good, b"stsc", 4, MOST), ""),
    "A40-samples-of-2-gigabytes": (lambda _, good: set_u32(good, b"stsz", 4, 2**31 - 1), ""),
    "A40-chunks-behind-the-end": (lambda _, good: set_u32(good, b"stco", 8, 2**31), ""),
    "A40-deep-boxes": (lambda _, good: good[:32] + deep_boxes(20_000), ""),
    "A40-endless-ebml": (lambda *_: b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" + bytes(5000), ""),
}
"""Files of which nothing can be shown, and what the message must say."""


@pytest.fixture(scope="module")
def refused_files(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("refused")
    return {name: maker(folder, clip) for name, (maker, _) in REFUSED.items()}


@attacks(Case(name, words=words, modalities=("video_url",)) for name, (_, words) in REFUSED.items())
def test_files_that_are_no_videos(server, refused_files, case, kind, stream):
    server.check_answer(case, kind, stream, url=data_url(refused_files[case.name], "video/mp4"))
    server.check_still_decodes()


@attacks(Case(name, modalities=("image_url", "time_series_url")) for name in REFUSED if "in-a-video" not in name)
def test_nor_are_they_pictures_or_series(server, refused_files, case, kind, stream):
    if kind == "time_series_url" and case.name == "A40-sound-only-wav":
        pytest.skip("a sound is a series")
    server.check_refused(case, kind, stream, url=data_url(refused_files[case.name], "application/octet-stream"))


# A42: files that refer to other files and addresses


REFERRING = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
    "m3u8-key": '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:9,\n{target}\n',
    "m3u8-master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
    "m3u8-map": '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-MAP:URI="{target}"\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n',
    "ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT9S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "smil": '<smil><body><video src="{target}"/></body></smil>',
    "asx": '<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
    "rtsp-redirect": "[Reference]\nRef1={target}\n",
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{target}" width="9" height="9"/></svg>',
    "xml-entity": '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "{target}">]><MPD>&b;</MPD>',
    "ffmetadata": ";FFMETADATA1\ntitle={target}\n",
    "image-list": "# img2\n{target}\n",
    "subtitles": "[Script Info]\nVideo File: {target}\n",
}
"""Texts that name another place; ``{target}`` is its URL or path, ``{port}`` its port."""


class Bait(http.server.ThreadingHTTPServer):
    """A real server of this machine that counts who comes, whatever library or process dials it."""

    def __init__(self, clip):
        self.hits = []
        bait = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(clip)

            def handle(self):
                bait.hits.append(self.client_address)
                super().handle()

            def log_message(self, format, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def bait(clip):
    server = Bait(clip)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def baited_file(media_root, clip):
    """A good clip inside the root: even what may be read is not read because another file says so."""
    path = media_root / "bait.mp4"
    path.write_bytes(clip)
    return path


def referring_file(name, target, port):
    if name == "dref":
        return forge.with_external_data(target)
    if name == "alis":
        return forge.with_external_alias(target.removeprefix("file://"))
    return REFERRING[name].replace("{target}", target).replace("{port}", str(port)).encode()


@attacks(Case(name) for name in (*REFERRING, "dref", "alis"))
def test_a42_no_file_leads_to_another(server, bait, baited_file, media_root, case, kind, stream):
    bait.hits.clear()
    port = bait.server_address[1]
    targets = [f"http://127.0.0.1:{port}/x.mp4", f"file://{baited_file}", str(baited_file), baited_file.name]
    named = media_root / "referring.mp4"
    with OpenWatch([baited_file]) as watch:
        for target in targets:
            data = referring_file(case.name, target, port)
            named.write_bytes(data)
            for url in (data_url(data, "application/octet-stream"), f"file://{named}"):
                server.check_answer(case, kind, stream, url=url)
        assert watch.opened() == []
    assert bait.hits == []
    server.check_still_decodes()


def test_the_bait_would_be_noticed(server, bait, baited_file):
    """The counters of the test above do count."""
    with OpenWatch([baited_file]) as watch:
        assert server.post(question(f"file://{baited_file}", "video_url", num_frames=2)).status_code == 200
        assert set(watch.opened()) == {baited_file.name}
    bait.hits.clear()
    assert httpx2.get(f"http://127.0.0.1:{bait.server_address[1]}/", trust_env=False).status_code == 200
    assert len(bait.hits) == 1


# A40, A41: files that must be shown, and shown right

ALL = tuple(range(20))
HEVC = ("-c:v", "libx265", "-x265-params", "log-level=none:pools=1")
HDR = ("-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc")

SHOWN: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "A40-one-frame": (lambda folder, _: clip(folder, "one.mp4", *X264, num_frames=1), (0,)),
    "A40-93-hours-in-the-header": (lambda _, good: set_u32(set_u32(good, b"mvhd", 16, MOST), b"mdhd", 16, MOST), ALL),
    "A40-million-fps": (lambda _, good: set_u32(good, b"mdhd", 12, 512 * 10**6), ALL),
    "A40-million-fps-mkv": (lambda folder, _: clip(folder, "fast.mkv", *X264, rate="1000000"), ALL),
    "A40-negative-times": (
        lambda folder, _: clip(folder, "n.mkv", *X264, "-output_ts_offset", "-100", "-avoid_negative_ts", "disabled"),
        ALL,
    ),
    "A40-negative-times-ts": (
        lambda folder, _: clip(folder, "n.ts", *X264, "-output_ts_offset", "-100", "-avoid_negative_ts", "disabled"),
        ALL,
    ),
    "A40-ten-years-between": (lambda folder, _: forge.far_jump(folder), ALL),
    "A40-huge-sample-entry": (lambda _, good: set_u32(good, b"avc1", 24, MOST), ALL),
    "A40-huge-track-header": (lambda _, good: set_u32(good, b"tkhd", 76, MOST, MOST), ALL),
    "A41-two-sizes": (lambda folder, _: forge.two_sizes(folder), tuple(range(40))),
    "A41-interlaced": (lambda folder, _: clip(folder, "i.mp4", *X264, "-flags", "+ilme+ildct"), ALL),
    "A41-interlaced-mpeg2": (
        lambda folder, _: clip(folder, "i.ts", "-c:v", "mpeg2video", "-q:v", "2", "-flags", "+ilme+ildct"),
        ALL,
    ),
    "A41-10-bit": (lambda folder, _: clip(folder, "10.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p10le"), ALL),
    "A41-4:4:4": (lambda folder, _: clip(folder, "444.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p"), ALL),
    "A41-4:2:2": (lambda folder, _: clip(folder, "422.mp4", "-c:v", "libx264", "-pix_fmt", "yuv422p"), ALL),
    "A41-hevc-10-bit": (lambda folder, _: clip(folder, "h.mp4", *HEVC, "-pix_fmt", "yuv420p10le"), ALL),
    "A41-hdr": (lambda folder, _: clip(folder, "hdr.mp4", *HEVC, "-pix_fmt", "yuv420p10le", *HDR), ALL),
    "A41-libaom-av1": (lambda folder, _: clip(folder, "a.mp4", "-c:v", "libaom-av1", "-cpu-used", "8"), ALL),
    "A41-libvpx-vp9": (lambda folder, _: clip(folder, "v.webm", "-c:v", "libvpx-vp9"), ALL),
    "A41-prores_ks": (lambda folder, _: clip(folder, "p.mov", "-c:v", "prores_ks"), ALL),
    "A41-hap": (lambda folder, _: clip(folder, "hap.mov", "-c:v", "hap"), ALL),
    "A41-mjpeg": (lambda folder, _: clip(folder, "m.mov", "-c:v", "mjpeg", "-q:v", "2"), ALL),
    "A41-jpeg2000": (lambda folder, _: clip(folder, "j.mp4", "-c:v", "jpeg2000"), ALL),
    "A41-png": (lambda folder, _: clip(folder, "png.mov", "-c:v", "png"), ALL),
    "A41-grey": (lambda folder, _: clip(folder, "grey.mkv", "-c:v", "ffv1", "-pix_fmt", "gray"), ALL),
    "A41-libtheora": (lambda folder, _: clip(folder, "t.ogv", "-c:v", "libtheora", "-q:v", "9"), ALL),
    "A41-rawvideo": (lambda folder, _: clip(folder, "raw.avi", "-c:v", "rawvideo", "-pix_fmt", "bgr24"), ALL),
}
"""Files that can be shown, and the numbers in their frames."""


async def decode(loader, data, frame_indices=None):
    """Frames as uint8 (num, HEIGHT, WIDTH, 3): those of ``frame_indices``, or all."""
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    opened = await loader.open(await loader.fetch(MediaItem(Modality.VIDEO, url=url)))
    try:
        indices = range(opened.metadata.total_num_frames) if frame_indices is None else frame_indices
        plan = FramePlan(tuple(indices), HEIGHT, WIDTH, LAYOUT)
        tensor, delivered = await loader.read(opened, plan)
        assert delivered == plan.frame_indices
        return frames_of(np.array(tensor.array), plan)
    finally:
        opened.close()


def frames_of(patches, plan):
    """Patch rows back to frames: the inverse of the reference's patch layout."""
    groups, rows, columns = plan.grid_thw
    merge, size, group = LAYOUT.merge_size, LAYOUT.patch_size, LAYOUT.temporal_patch_size
    view = patches.reshape(groups, rows // merge, columns // merge, merge, merge, 3, group, size, size)
    frames = view.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(groups * group, rows * size, columns * size, 3)
    return frames[: len(plan.frame_indices)]


@pytest.fixture(scope="module")
def shown_files(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("shown")
    return {name: maker(folder, clip) for name, (maker, _) in SHOWN.items() if can_be_made(name)}


def can_be_made(name):
    encoder = name.partition("-")[2]
    return encoder not in CODECS or has_encoder(encoder)


CODECS = frozenset({"libaom-av1", "libvpx-vp9", "prores_ks", "hap", "mjpeg", "jpeg2000", "libtheora"})


@pytest.fixture(scope="module")
def decoded(shown_files):
    """All frames of every file, or the error."""

    async def decode_all():
        loader = MediaLoader(MediaConfig(num_decode_threads=2))
        results = {}
        for name, data in shown_files.items():
            try:
                results[name] = await decode(loader, data)
            except FilmstripError as error:
                results[name] = error
        await loader.close()
        return results

    return asyncio.run(decode_all())


@pytest.mark.parametrize("name", SHOWN)
def test_what_can_be_shown_is_shown_right(decoded, name):
    if not can_be_made(name):
        pytest.skip("this ffmpeg has no such encoder")
    frames = decoded[name]
    assert isinstance(frames, np.ndarray), frames
    assert tuple(map(read_number, frames)) == SHOWN[name][1]
    assert frames.mean() > 15  # the dark bars have 20
    assert frames.max() > 60


@attacks(Case(name, modalities=("video_url",)) for name in SHOWN)
def test_what_can_be_shown_is_answered(server, shown_files, case, kind, stream):
    if not can_be_made(case.name):
        pytest.skip("this ffmpeg has no such encoder")
    messages = question(data_url(shown_files[case.name], "video/mp4"), kind, num_frames=4)
    answer = server.post(messages, stream=stream)
    assert answer.status_code == 200, answer.text


async def test_a40_pictures_of_odd_shapes_are_not_black(tmp_path):
    loader = MediaLoader(MediaConfig(num_decode_threads=2))
    try:
        for width, height in ((1, 1), (2, 2), (8, 100_000), (16384, 2)):
            data = clip(tmp_path, "odd.mkv", "-c:v", "ffv1", num_frames=2, width=width, height=height)
            frames = await decode(loader, data)
            assert len(frames) == 2
            assert frames.min() >= 10, (width, height)  # the darkest bar has 20
    finally:
        await loader.close()
