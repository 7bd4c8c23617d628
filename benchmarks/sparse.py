"""Frames of an hour of video behind HTTP: parts of the file against all of it; knows no model weights.

A media server on this machine, in a process of its own, sends at most ``--megabytes-per-second`` over all connections
together, and every answer begins ``--latency-milliseconds`` late. Under one path it names a strong validator and sends
ranges, so that the loader fetches the header and the groups of pictures that the plan needs; under another it does neither,
so that the loader must download everything. Each sample is a fresh loader with empty caches; the two ways take turns.

    python benchmarks/sparse.py --source clip.mp4 --clips-folder CLIPS
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import torch
from ingest import MAX_PIXELS, MIN_PIXELS, Clip, machine, make_clip

from filmstrip.config import MediaConfig
from filmstrip.media.loader import MediaLoader
from filmstrip.processing.vision import VisionSettings, resize_video
from filmstrip.types import FramePlan, MediaItem, Modality, Normalization, PatchLayout, PixelLimits

RESULTS = Path(__file__).parent / "results" / "sparse.json"
CLIP = Clip(720, 120, 250, repeats=30)
QUICK_CLIP = Clip(480, 15, 250, repeats=10)
WAYS = ("parts", "whole")
PIECE_BYTES = 64 * 1024
ETAG = '"benchmark"'
SETTINGS = VisionSettings(
    PatchLayout(16, 2, 2),
    Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    min_pixels=MIN_PIXELS,
    max_pixels=MAX_PIXELS,
)


class Rate:
    """Lets bytes through no faster than ``bytes_per_second``, over everybody who asks."""

    def __init__(self, bytes_per_second: float) -> None:
        self._seconds_per_byte = 1 / bytes_per_second
        self._free_at = 0.0

    async def wait(self, num_bytes: int) -> None:
        """Return when ``num_bytes`` more may go out."""
        now = time.monotonic()
        # A sleep that took too long is made up for by what comes next, up to a twentieth of a second.
        self._free_at = max(self._free_at, now - 0.05) + num_bytes * self._seconds_per_byte
        if self._free_at - now > 0.002:  # shorter sleeps come out longer
            await asyncio.sleep(self._free_at - now)


class MediaServer:
    """``/parts`` with ranges and a validator, ``/whole`` without; ``/count`` tells the bytes sent since the last time."""

    def __init__(self, path: Path, bytes_per_second: float, latency_seconds: float) -> None:
        self._path, self._num_bytes = path, path.stat().st_size
        self._rate, self._latency_seconds = Rate(bytes_per_second), latency_seconds
        self._num_sent = self._num_requests = 0

    async def serve(self) -> None:
        """Run until the process is ended; the port goes to standard output."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await self._answer((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"), writer)
        writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        if head.startswith("GET /count"):
            body = json.dumps([self._num_sent, self._num_requests]).encode()
            self._num_sent = self._num_requests = 0
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            return
        self._num_requests += 1
        await asyncio.sleep(self._latency_seconds)
        start, stop, status, fields = 0, self._num_bytes, "200 OK", ""
        if head.startswith("GET /parts"):
            fields = f"ETag: {ETAG}\r\nAccept-Ranges: bytes\r\n"
            wanted = re.search(r"(?im)^range: bytes=(\d+)-(\d*)", head)
            if wanted:
                start, stop = int(wanted[1]), min(int(wanted[2] or stop) + 1, stop)
                status = "206 Partial Content"
                fields += f"Content-Range: bytes {start}-{stop - 1}/{self._num_bytes}\r\n"
        head = f"HTTP/1.1 {status}\r\nContent-Type: video/mp4\r\nContent-Length: {stop - start}\r\n{fields}\r\n"
        writer.write(head.encode())
        with self._path.open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(PIECE_BYTES, stop - start))
                await self._rate.wait(len(piece))
                writer.write(piece)
                await writer.drain()
                start += len(piece)
                self._num_sent += len(piece)


@contextlib.contextmanager
def media_server(arguments: argparse.Namespace, clip: Path) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, __file__, "--serve", str(clip)]
    command += ["--megabytes-per-second", str(arguments.megabytes_per_second)]
    command += ["--latency-milliseconds", str(arguments.latency_milliseconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


async def sample(url: str, num_frames: int) -> dict[str, float]:
    """Seconds and bytes until the patches of ``num_frames`` frames are there."""
    config = MediaConfig(allow_private_media_urls=True, download_cache_gb=0, fetch_timeout_seconds=600)
    loader = MediaLoader(config)
    try:
        await loader.start()
        started = time.perf_counter()
        fetched = await loader.fetch(MediaItem(Modality.VIDEO, url=url))
        opened = await loader.open(fetched)
        clip: Any = opened.metadata
        opened_at = time.perf_counter()
        indices = tuple((clip.total_num_frames - 1) * i // (num_frames - 1) for i in range(num_frames))
        height, width = resize_video(num_frames, clip.height, clip.width, SETTINGS, PixelLimits())
        patches, delivered = await loader.read(opened, FramePlan(indices, height, width, SETTINGS.layout))
        seconds = time.perf_counter() - started
        opened.close()
        if delivered != indices:
            raise SystemExit("not all frames were delivered")
        return {
            "seconds": seconds,
            "seconds_to_plan": opened_at - started,
            "checksum": float(patches.array.sum(dtype="int64")),
        }
    finally:
        await loader.close()


async def count(url: str) -> tuple[int, int]:
    """Bytes and requests since the last time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"GET /count HTTP/1.1\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    assert length is not None
    num_bytes, num_requests = json.loads(await reader.readexactly(int(length[1])))
    writer.close()
    return num_bytes, num_requests


async def measure(arguments: argparse.Namespace, url: str) -> dict[str, list[dict[str, float]]]:
    """All rounds, the ways taking turns."""
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in WAYS:
            await count(url)
            one = await sample(f"{url}/{way}.mp4", arguments.frames)
            num_bytes, num_requests = await count(url)
            samples[way].append({**one, "num_bytes": num_bytes, "num_requests": num_requests})
            print(f"round {number + 1}, {way}: {one['seconds']:.2f} s, {num_bytes / 1e6:.1f} MB", file=sys.stderr)
    if len({one["checksum"] for way in WAYS for one in samples[way]}) != 1:
        raise SystemExit("the ways gave different pixels")
    return samples


def table(results: dict[str, Any]) -> str:
    """Markdown for the README."""
    lines = ["| | fetched | requests | until the plan | until the pixels |", "| --- | ---: | ---: | ---: | ---: |"]
    for way, title in (("parts", "only what is needed"), ("whole", "whole download")):
        median = results["median"][way]
        lines.append(
            f"| {title} | {median['num_bytes'] / 1e6:.1f} MB | {median['num_requests']:.0f} "
            f"| {median['seconds_to_plan']:.2f} s | {median['seconds']:.2f} s |"
        )
    parts, whole = results["median"]["parts"], results["median"]["whole"]
    lines += [
        "",
        f"{results['num_frames']} frames, evenly over a clip of {results['clip_seconds'] / 60:.0f} minutes "
        f"({results['clip']}, {results['clip_bytes'] / 1e6:.0f} MB), from a server that sends "
        f"{results['megabytes_per_second']:g} MB/s, {results['latency_milliseconds']:g} ms after it is asked: "
        f"{whole['num_bytes'] / parts['num_bytes']:.0f} times fewer bytes, {whole['seconds'] / parts['seconds']:.1f} times "
        f"sooner; medians of {len(results['samples']['parts'])} interleaved rounds, {results['machine']['cores_used']} "
        f"cores of {results['machine']['cpu']}, the same pixels both ways. `{results['command']}`",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of the results and exit")
    parser.add_argument("--clips-folder", type=Path, default=Path("ingest-clips"), help="made clips are kept here")
    parser.add_argument("--source", type=Path, help="real footage to make the clip of; else a test pattern")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes-per-second", type=float, default=50)
    parser.add_argument("--latency-milliseconds", type=float, default=20)
    parser.add_argument("--quick", action="store_true", help="a short clip; printed, not written")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    if arguments.serve:
        rate, latency = arguments.megabytes_per_second * 1e6, arguments.latency_milliseconds / 1000
        asyncio.run(MediaServer(arguments.serve, rate, latency).serve())
        return
    clip = QUICK_CLIP if arguments.quick else CLIP
    path = make_clip(clip, arguments.source, arguments.clips_folder)
    with media_server(arguments, path) as url:
        samples = asyncio.run(measure(arguments, url))
    results = {
        "question": "what do 32 frames of an hour of video cost when only their parts of the file are fetched?",
        "command": re.sub(
            r"(?<![\w.])/(?:[\w.+-]+/)+", "", shlex.join(["python", "benchmarks/sparse.py", *sys.argv[1:]])
        ),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(len(os.sched_getaffinity(0))),
        "versions": {"torch": torch.__version__, "av": av.__version__},
        "clip": path.name,
        "clip_bytes": path.stat().st_size,
        "clip_seconds": clip.seconds * clip.repeats,
        "num_frames": arguments.frames,
        "megabytes_per_second": arguments.megabytes_per_second,
        "latency_milliseconds": arguments.latency_milliseconds,
        "median": {
            way: {key: statistics.median(one[key] for one in samples[way]) for key in samples[way][0]} for way in WAYS
        },
        "samples": samples,
    }
    if not arguments.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
