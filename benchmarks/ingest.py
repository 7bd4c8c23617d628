"""Video clips in, seconds and peak memory of reading them out, ours beside other libraries'; knows no model weights.

    python benchmarks/ingest.py --source clip.mp4 --clips-folder CLIPS --peers-python PEERS/bin/python
    python benchmarks/ingest.py --table

Every single measurement runs in a fresh process, restricted to the same cores, that imports its library, warms up on another
clip, does one job and prints JSON. Rounds are interleaved (ours, each peer, the raw limit, ours again ...), so that a slow
spell of the machine falls on everybody. Peers may live in a Python environment of their own (``--peers-python``): this file
imports only the standard library at its top, and each measurement imports what it measures.

Peers read as their users do: OpenCV grabs every frame up to the last wanted one and retrieves the wanted ones, as LMDeploy's
and vLLM's loaders do; decord ``get_batch``; torchcodec ``get_frames_at`` in exact seek mode with one FFmpeg thread and with
its automatic number, of which the table shows the faster. Where model patches are wanted the peers' frames go through
Transformers' ``Qwen3VLVideoProcessor``, and ours come from the loader that the server uses, with a worker process for each
clip. Several requests at once are as many threads in the peers' process, as servers built on them have.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "ingest.json"
FRAMES_PER_SECOND = 30
# The pixel budget of a whole video in the published Qwen3-VL checkpoints (``video_preprocessor_config.json``).
MIN_PIXELS, MAX_PIXELS = 4096, 25165824
LIMIT_SAMPLE_PACKETS = 1000
# A peer whose first sample takes longer than the key, in seconds, gets at most so many samples (the first key
# that fits): decoding ten minutes to get at 32 frames would take most of the run.
MAX_SAMPLES_WHEN_SLOW = {60.0: 1, 25.0: 2}
MEBIBYTE = 2**20
DESCRIPTION = ("shape", "dtype", "grid_thw", "crc32", "versions")
# Block means of two tools' frames may differ by their colour conversion (1 to 2 levels), not by another frame's content.
MAX_LEVEL_DIFFERENCE = 4.0


@dataclass(frozen=True)
class Clip:
    """One generated H.264 clip; ``repeats`` times the same ``seconds``, one after the other."""

    height: int
    seconds: int
    gop: int
    repeats: int = 1

    @property
    def width(self) -> int:
        """16:9, rounded up to even."""
        return -(-self.height * 16 // 18) * 2

    @property
    def num_frames(self) -> int:
        """Frames of the whole clip."""
        return self.seconds * self.repeats * FRAMES_PER_SECOND

    def name(self, source: str) -> str:
        """File name; ``source`` names what is seen in it."""
        return f"{source}-{self.height}p-{self.seconds * self.repeats}s-gop{self.gop}.mp4"


@dataclass(frozen=True)
class Case:
    """Frames evenly over a clip, to full-size RGB (``frames``) or to normalised model patches (``patches``).

    ``peers``: those that take part; ``num_requests`` for the same are made at once.
    """

    title: str
    clip: Clip
    num_frames: int
    kind: str = "frames"
    num_requests: int = 1
    peers: tuple[str, ...] = ("opencv", "decord", "torchcodec_1_thread", "torchcodec_auto_threads")

    @property
    def frame_indices(self) -> list[int]:
        """First to last frame, evenly, truncated: ``numpy.linspace(0, total - 1, num_frames).astype(int)``."""
        last, steps = self.clip.num_frames - 1, max(self.num_frames - 1, 1)
        return [last * i // steps for i in range(self.num_frames)]


CASES = {
    "short_480p": Case("32 frames, 480p 15 s, GOP 250", Clip(480, 15, 250), 32),
    "medium_720p": Case("32 frames, 720p 2 min, GOP 250", Clip(720, 120, 250), 32),
    "long_1080p_gop250": Case("32 frames, 1080p 10 min, GOP 250", Clip(1080, 600, 250), 32),
    "long_1080p_gop48": Case("32 frames, 1080p 10 min, GOP 48", Clip(1080, 600, 48), 32),
    "dense_1080p": Case("768 frames to patches, 1080p 2 min, GOP 48", Clip(1080, 120, 48), 768, "patches"),
    "hour_1080p": Case(
        "768 frames to patches, 1080p 60 min, GOP 48",
        Clip(1080, 600, 48, repeats=6),
        768,
        "patches",
        peers=("torchcodec_1_thread", "torchcodec_auto_threads"),
    ),
    "eight_720p": Case(
        "8 requests at once: 32 frames to patches, 720p 2 min, GOP 250", Clip(720, 120, 250), 32, "patches", 8
    ),
}
QUICK_CASES = {
    "quick_frames": Case("8 frames, 180p 4 s, GOP 48", Clip(180, 4, 48), 8),
    "quick_patches": Case("16 frames to patches, 180p 4 s, GOP 48", Clip(180, 4, 48), 16, "patches"),
    "quick_requests": Case(
        "3 requests at once: 16 frames to patches, 180p 8 s, GOP 48", Clip(180, 4, 48, repeats=2), 16, "patches", 3
    ),
}
WARM_UP = Case("warm-up", Clip(120, 1, 10), 4)
PEERS = Case.peers


# ---------------------------------------------------------------------------------------------------------------- clips


def make_clip(clip: Clip, source: Path | None, folder: Path) -> Path:
    """Encode ``clip`` into ``folder`` unless it is there already: ``source`` looped, scaled and with a little noise.

    x264 veryfast with 3 B-frames and key frames at exactly every ``gop`` frames. Without a source a test pattern is shown.
    """
    path = folder / clip.name(source.stem if source else "pattern")
    if path.exists():
        return path
    if clip.repeats > 1:
        return _repeat(make_clip(replace(clip, repeats=1), source, folder), clip.repeats, path)
    folder.mkdir(parents=True, exist_ok=True)
    size = f"{clip.width}x{clip.height}"
    pattern = ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={FRAMES_PER_SECOND}"]
    looped = ["-stream_loop", "-1", "-i", str(source)]
    # Footage scaled up is smoother than what cameras write, and smooth pictures decode too easily: hence the noise.
    filters = f"fps={FRAMES_PER_SECOND},scale={clip.width}:{clip.height}:flags=bicubic,noise=alls=8:allf=t"
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-bf", "3", "-g", str(clip.gop)]
    unfinished = path.with_suffix(".unfinished")
    command = ["ffmpeg", "-v", "error", "-y", *(looped if source else pattern), "-vf", filters, *encoder]
    command += [
        "-sc_threshold",
        "0",
        "-frames:v",
        str(clip.num_frames),
        "-an",
        "-sn",
        "-dn",
        "-f",
        "mp4",
        str(unfinished),
    ]
    print(f"encoding {path.name}", file=sys.stderr)
    subprocess.run(command, check=True)
    unfinished.rename(path)
    return path


def _repeat(once: Path, repeats: int, path: Path) -> Path:
    """``once`` several times in one file, its packets as they are."""
    unfinished = path.with_suffix(".unfinished")
    command = ["ffmpeg", "-v", "error", "-y", "-stream_loop", str(repeats - 1), "-i", str(once), "-c", "copy"]
    subprocess.run([*command, "-f", "mp4", str(unfinished)], check=True)
    unfinished.rename(path)
    return path


# ---------------------------------------------------------------------------------- one measurement, in a process of its own

Job = Callable[[str, list[int], int], "Result"]


@dataclass
class Result:
    """What a job made, and what it measured beside the whole."""

    array: Any
    extra: dict[str, Any]
    finish: Callable[[], tuple[Any, dict[str, Any]]] | None = None
    """A second step measured on its own; gives the array to compare in place of the first."""
    check: Callable[[], None] | None = None
    """What must hold of the results; looked at when nothing is measured any more."""


def measure(tool: str, case: Case, path: str, warm_up_path: str, num_cores: int) -> dict[str, Any]:
    """Run one job in this process, restricted to ``num_cores``, and say what it took.

    Memory is resident memory (shared pages included) above what the process had after its imports: ``peak_bytes`` is the
    highest mark during the job. The kernel's mark is reset after the warm-up, so imports do not count.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])
    job, versions = JOBS[tool](case, num_cores)
    baseline = _resident_bytes("VmRSS")
    warm_up = job(warm_up_path, WARM_UP.frame_indices, num_cores)
    if warm_up.finish:
        warm_up.finish()
    del warm_up
    _reset_peak()
    before = time.perf_counter()
    result = job(path, case.frame_indices, num_cores)
    seconds = time.perf_counter() - before
    report = {"seconds": seconds, "baseline_bytes": baseline, "versions": versions, **result.extra}
    report["peak_bytes"] = _resident_bytes("VmHWM") - baseline + result.extra.get("worker_peak_bytes", 0)
    array = result.array
    if result.finish:
        before = time.perf_counter()
        array, extra = result.finish()
        report["finish_seconds"] = time.perf_counter() - before
        # The workers are gone by now; their results are in shared memory that counts here from when it is read.
        report["finish_peak_bytes"] = max(_resident_bytes("VmHWM") - baseline, report["peak_bytes"])
        report.update(extra)
    if result.check:
        result.check()
    if array is not None:
        report.update(_describe(array, case))
    return report


def _check_alike(arrays: Sequence[Any]) -> None:
    """Several requests for the same must get the same."""
    _require(all((arrays[0] == each).all() for each in arrays[1:]), "requests got different pixels")


def _resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")
    return int(match[1]) * 1024


def _reset_peak() -> None:
    """Set the highest mark of resident memory to what is resident now (proc(5), ``clear_refs``)."""
    Path("/proc/self/clear_refs").write_text("5")


def _describe(array: Any, case: Case) -> dict[str, Any]:
    """Shape, type, checksum, and means of blocks by which results of different tools can be compared."""
    import numpy as np

    if case.kind == "frames":
        count, height, width, _ = array.shape
        blocks = [
            frame[: height // 4 * 4, : width // 4 * 4].reshape(4, height // 4, 4, width // 4, 3) for frame in array
        ]
        means = [block.mean(axis=(1, 3, 4), dtype=np.float64).ravel() for block in blocks]
    else:
        # Runs of rows that never cross a temporal group, so that every frame pair has means of its own.
        count = case.num_frames // 2
        means = [group.reshape(8, -1).mean(axis=1, dtype=np.float64) * 127.5 for group in np.split(array, count)]
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "crc32": zlib.crc32(np.ascontiguousarray(array).data),
        "block_means": [round(float(mean), 2) for mean in np.concatenate(means)],
    }


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _filmstrip(case: Case, num_cores: int) -> tuple[Job, dict[str, str]]:
    """Ours: ``read_frames`` on a file for frames, the server's loader for patches; the file is hashed as for a request."""
    import av
    import torch

    torch.set_num_threads(num_cores)
    versions = {**_versions("filmstrip", "av", "torch"), "ffmpeg": av.ffmpeg_version_info}
    return (_our_frames() if case.kind == "frames" else _our_patches(case, num_cores)), versions


def _our_frames() -> Job:
    from filmstrip.media.source import FileSource
    from filmstrip.media.video import open_video, read_frames

    def frames(path: str, indices: list[int], num_threads: int) -> Result:
        before = time.perf_counter()
        source = FileSource(os.open(path, os.O_RDONLY))
        hashed = time.perf_counter()
        reader = open_video(source)
        extra = {"hash_seconds": hashed - before, "scan_seconds": time.perf_counter() - hashed}
        array, delivered = read_frames(reader, indices, num_threads)
        _require(list(delivered) == indices, "not all frames were delivered")
        return Result(array, extra)

    return frames


def _our_patches(case: Case, num_cores: int) -> Job:
    """All requests through one loader; normalising, which the model does, is a step of its own."""
    import asyncio

    import numpy as np
    import torch

    # What follows a model's loading in the server is imported before the baseline is taken, as for the peers.
    from filmstrip.config import MediaConfig
    from filmstrip.media.loader import MediaLoader
    from filmstrip.models.qwen_vl import MAX_PATCHES_PER_FORWARD, normalize_patches
    from filmstrip.processing.vision import VisionSettings, resize_video
    from filmstrip.types import FramePlan, MediaItem, Modality, Normalization, PatchLayout, PixelLimits

    settings = VisionSettings(
        PatchLayout(16, 2, 2),
        Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
    )
    torch.set_num_threads(max(1, num_cores // case.num_requests))  # as the peers' processors
    loop = asyncio.new_event_loop()
    loader = MediaLoader(MediaConfig(num_decode_threads=num_cores, max_media_bytes=2**40))
    loop.run_until_complete(loader.start())

    async def one(path: str, indices: list[int]) -> tuple[Any, FramePlan, dict[str, float]]:
        times = [time.perf_counter()]
        fetched = await loader.fetch(MediaItem(Modality.VIDEO, url=path))
        times.append(time.perf_counter())
        opened = await loader.open(fetched)
        times.append(time.perf_counter())
        clip: Any = opened.metadata
        height, width = resize_video(len(indices), clip.height, clip.width, settings, PixelLimits())
        plan = FramePlan(tuple(indices), height, width, settings.layout)
        output, delivered = await loader.read(opened, plan)
        opened.close()
        times.append(time.perf_counter())
        _require(list(delivered) == indices, "not all frames were delivered")
        names = ("hash_seconds", "scan_seconds", "read_seconds")
        return output, plan, {name: times[i + 1] - times[i] for i, name in enumerate(names)}

    def patches(path: str, indices: list[int], _num_threads: int) -> Result:
        async def all_of_them() -> list[tuple[Any, FramePlan, dict[str, float]]]:
            return await asyncio.gather(*(one(path, indices) for _ in range(case.num_requests)))

        loader.worker_stats.peak_memory_bytes = 0
        done = loop.run_until_complete(all_of_them())
        num_at_once = min(case.num_requests, num_cores)  # as many clips are read at the same time
        extra = {name: statistics.median(times[name] for _, _, times in done) for name in done[0][2]}
        extra["worker_peak_bytes"] = num_at_once * loader.worker_stats.peak_memory_bytes

        normalized: list[Any] = []

        def normalize(output: Any, plan: FramePlan) -> Any:
            """The model's normalising, in runs of as many rows as it takes at a time."""
            rows = output.torch()
            pixel_values = np.empty(plan.patches_shape, np.float32)
            for first in range(0, len(rows), MAX_PATCHES_PER_FORWARD):
                piece = rows[first : first + MAX_PATCHES_PER_FORWARD]
                pixel_values[first : first + len(piece)] = normalize_patches(piece, settings.normalization).numpy()
            return pixel_values

        def normalize_all() -> tuple[Any, dict[str, Any]]:
            """As many requests at once as in the peers' process."""
            with ThreadPoolExecutor(case.num_requests) as threads:
                normalized.extend(threads.map(lambda each: normalize(*each[:2]), done))
            return normalized[0], {"grid_thw": list(done[0][1].grid_thw)}

        return Result(None, extra, normalize_all, lambda: _check_alike(normalized))

    return patches


def _opencv(case: Case, num_cores: int) -> tuple[Job, dict[str, str]]:
    """Grab every frame up to the last wanted one, retrieve the wanted ones, BGR to RGB."""
    import cv2  # pyright: ignore[reportMissingImports]
    import numpy as np

    cv2.setNumThreads(num_cores)
    info = re.search(r"avcodec:\s+YES \(([^)]*)\)", cv2.getBuildInformation())
    versions = {"opencv": cv2.__version__, "avcodec": info[1] if info else "unknown"}

    def read(path: str, indices: list[int], _num_threads: int) -> Any:
        capture = cv2.VideoCapture(path)
        _require(capture.isOpened(), "OpenCV cannot open the clip")
        height, width = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        frames = np.empty((len(indices), height, width, 3), np.uint8)
        wanted = {index: position for position, index in enumerate(indices)}
        for index in range(indices[-1] + 1):
            _require(capture.grab(), f"OpenCV cannot grab frame {index}")
            if index in wanted:
                good, frame = capture.retrieve()
                _require(good, f"OpenCV cannot retrieve frame {index}")
                frames[wanted[index]] = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        capture.release()
        return frames

    return _peer(read, case, num_cores, versions)


def _decord(case: Case, num_cores: int) -> tuple[Job, dict[str, str]]:
    """``VideoReader.get_batch``, threads chosen by decord."""
    import decord  # pyright: ignore[reportMissingImports]

    def read(path: str, indices: list[int], _num_threads: int) -> Any:
        return decord.VideoReader(path).get_batch(indices).asnumpy()

    return _peer(read, case, num_cores, {"decord": decord.__version__})


def _torchcodec(num_ffmpeg_threads: int) -> Callable[[Case, int], tuple[Job, dict[str, str]]]:
    """``VideoDecoder.get_frames_at`` in exact seek mode; 0 threads means FFmpeg's choice."""

    def prepare(case: Case, num_cores: int) -> tuple[Job, dict[str, str]]:
        import torch
        import torchcodec  # pyright: ignore[reportMissingImports]
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(num_cores)
        versions = {**_versions("torchcodec", "torch"), "ffmpeg_major": str(torchcodec.ffmpeg_major_version)}

        def read(path: str, indices: list[int], _num_threads: int) -> Any:
            decoder = VideoDecoder(
                path, seek_mode="exact", num_ffmpeg_threads=num_ffmpeg_threads, dimension_order="NHWC"
            )
            return decoder.get_frames_at(indices).data.numpy()

        return _peer(read, case, num_cores, versions)

    return prepare


def _peer(
    read: Callable[[str, list[int], int], Any], case: Case, num_cores: int, versions: dict[str, str]
) -> tuple[Job, dict[str, str]]:
    """A job that reads frames, and in the dense case gives them to Transformers' processor."""
    if case.kind == "frames":
        return lambda path, indices, num_threads: Result(read(path, indices, num_threads), {}), versions
    # Requests at once share the cores among their processors, too, lest they fight for them.
    processor, processor_versions = _reference_processor(max(1, num_cores // case.num_requests))

    def one(path: str, indices: list[int], num_threads: int) -> tuple[Any, dict[str, float]]:
        before = time.perf_counter()
        frames = read(path, indices, num_threads)
        decoded = time.perf_counter()
        features = processor(frames)
        return features, {"decode_seconds": decoded - before, "processor_seconds": time.perf_counter() - decoded}

    def patches(path: str, indices: list[int], num_threads: int) -> Result:
        with ThreadPoolExecutor(case.num_requests) as threads:
            done = list(threads.map(lambda _: one(path, indices, num_threads), range(case.num_requests)))
        arrays = [features["pixel_values_videos"].numpy() for features, _ in done]
        extra: dict[str, Any] = {name: statistics.median(times[name] for _, times in done) for name in done[0][1]}
        extra["grid_thw"] = done[0][0]["video_grid_thw"][0].tolist()
        return Result(arrays[0], extra, check=lambda: _check_alike(arrays))

    return patches, {**versions, **processor_versions}


def _reference_processor(num_cores: int) -> tuple[Callable[[Any], Any], dict[str, str]]:
    """Transformers' ``Qwen3VLVideoProcessor`` on frames (T, H, W, 3), with the budget of the published checkpoints."""
    import torch

    torch.set_num_threads(num_cores)
    operators = _torchvision_operators(torch)
    from transformers import Qwen3VLVideoProcessor

    processor = Qwen3VLVideoProcessor(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        do_sample_frames=False,
        cap_pixels_per_frame=False,
    )

    def process(frames: Any, _operators: Any = operators) -> Any:  # they live as long as something holds them
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return processor(videos=[video], return_tensors="pt")

    return process, _versions("transformers", "torchvision")


def _torchvision_operators(torch: Any) -> Any:
    """Make torchvision importable beside a torch build that its compiled operators were not made for.

    Its import needs only that two of them are known, and resizing needs none. Gives what has to be kept alive.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torchvision'")
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C*.so"))))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def _limit(case: Case, num_cores: int) -> tuple[Job, dict[str, str]]:
    """The least a decoder has to do: how many packets, and how fast a sample is done by one thread and by one on each core.

    Cores that share caches, memory and execution units are slower together than each alone.
    """
    import av
    import numpy as np

    def sample(path: str, indices: list[int], _num_threads: int) -> Result:
        with av.open(path) as container:
            stream = container.streams.best("video")
            packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
        times = np.array([time_ for time_, _ in packets])
        keys = np.flatnonzero([is_key for _, is_key in packets])
        display = np.argsort(times)
        counts: dict[int, int] = {}  # by key frame: packets up to the last wanted frame of its GOP
        for coded in display[indices].tolist():
            key = int(keys[np.searchsorted(keys, coded, side="right") - 1])
            counts[key] = max(counts.get(key, 0), coded - key + 1)
        by_time = {int(times[key]): count for key, count in counts.items()}
        num_packets, seconds = _decode_some(path, by_time)
        before = time.perf_counter()
        with ThreadPoolExecutor(num_cores) as threads:
            num_together = sum(
                count for count, _ in threads.map(lambda _: _decode_some(path, by_time), range(num_cores))
            )
        together = num_together / (time.perf_counter() - before)
        needed = sum(counts.values()) * case.num_requests
        extra = {"needed_packets": needed, "needed_gops": len(counts), "sample_packets": num_packets}
        return Result(
            None, {**extra, "packets_per_second": num_packets / seconds, "packets_per_second_together": together}
        )

    return sample, {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info}


def _decode_some(path: str, counts: dict[int, int]) -> tuple[int, float]:
    """Decode GOPs, evenly chosen among ``counts`` (key frame's pts: packets), with one thread and NONREF skipping.

    Returns the packets decoded, about ``LIMIT_SAMPLE_PACKETS``, and the seconds.
    """
    import av

    step = max(1, sum(counts.values()) // LIMIT_SAMPLE_PACKETS)
    num_packets, seconds = 0, 0.0
    with av.open(path) as container:
        stream = container.streams.best("video")
        codec = stream.codec_context
        codec.thread_type, codec.thread_count, codec.skip_frame = "NONE", 1, "NONREF"
        for pts in sorted(counts)[::step]:
            container.seek(pts, stream=stream, backward=True, any_frame=False)
            before, left = time.perf_counter(), counts[pts]
            for packet in container.demux(stream):
                codec.decode(packet)
                left -= 1
                if not left:
                    break
            codec.decode(None)
            seconds += time.perf_counter() - before
            num_packets += counts[pts]
    return num_packets, seconds


JOBS: dict[str, Callable[[Case, int], tuple[Job, dict[str, str]]]] = {
    "filmstrip": _filmstrip,
    "opencv": _opencv,
    "decord": _decord,
    "torchcodec_1_thread": _torchcodec(1),
    "torchcodec_auto_threads": _torchcodec(0),
    "limit": _limit,
}


def _require(good: bool, problem: str) -> None:
    if not good:
        raise RuntimeError(problem)


# ----------------------------------------------------------------------------------------------------------------- rounds


def run_measurement(python: str, tool: str, case_name: str, paths: Sequence[Path], num_cores: int) -> dict[str, Any]:
    """One measurement in a fresh process; ``{"error": ...}`` with the last line it wrote if it fails."""
    arguments = ["--measure", tool, case_name, *map(str, paths), "--cores", str(num_cores)]
    done = subprocess.run([python, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"error": _without_folders(lines[-1] if lines else f"exit status {done.returncode}")}
    return json.loads(done.stdout.splitlines()[-1])


def _without_folders(text: str) -> str:
    """Absolute paths in ``text`` cut down to their last part: results say nothing of the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def run_case(case_name: str, case: Case, options: argparse.Namespace, paths: Sequence[Path]) -> dict[str, Any]:
    """All rounds of one case, tools interleaved; a tool that fails is not tried again, a slow peer sits out."""
    tools = ("filmstrip", *case.peers, "limit")
    samples: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    errors: dict[str, str] = {}
    for round_number in range(options.rounds):
        for tool in tools:
            if tool in errors or len(samples[tool]) >= _max_samples(tool, samples[tool]):
                continue
            python = options.peers_python if tool in PEERS else sys.executable
            sample = run_measurement(python, tool, case_name, paths, options.cores)
            if "error" in sample:
                errors[tool] = sample["error"]
            else:
                samples[tool].append(sample)
            shown = sample.get("error") or f"{sample['seconds']:.2f} s"
            print(f"{case_name} round {round_number + 1} {tool}: {shown}", file=sys.stderr)
    return {
        "title": case.title,
        "clip": paths[0].name,
        "clip_bytes": paths[0].stat().st_size,
        "kind": case.kind,
        "num_frames": case.num_frames,
        **_summary(samples, errors, options),
    }


def _max_samples(tool: str, samples: Sequence[dict[str, Any]]) -> float:
    """How often a tool is measured at most, by how long its first sample took."""
    if tool in PEERS and samples:
        for seconds, count in MAX_SAMPLES_WHEN_SLOW.items():
            if samples[0]["seconds"] > seconds:
                return count
    return math.inf


def _summary(
    samples: dict[str, list[dict[str, Any]]], errors: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    limits = samples.pop("limit")
    tools: dict[str, Any] = {}
    reference = samples["filmstrip"][0] if samples["filmstrip"] else {"block_means": [], "crc32": None}
    for tool, values in samples.items():
        if not values:
            tools[tool] = {"error": errors.get(tool, "not run")}
            continue
        tools[tool] = {
            "rounds": len(values),
            "median": {key: _median(values, key) for key in values[0] if key.endswith(("_bytes", "seconds"))},
            **{key: values[0][key] for key in DESCRIPTION if key in values[0]},
            "same_bytes_every_round": len({value["crc32"] for value in values}) == 1,
            "same_bytes_as_filmstrip": values[0]["crc32"] == reference["crc32"],
            "max_level_difference": _max_difference(values[0]["block_means"], reference["block_means"]),
            **({"note": "fewer rounds, because it is slow"} if len(values) < options.rounds else {}),
            "samples": [{key: value[key] for key in value if key.endswith(("_bytes", "seconds"))} for value in values],
        }
    summary: dict[str, Any] = {"tools": tools, "ratios": _ratios(tools)}
    if limits:
        rate, needed = _median(limits, "packets_per_second"), limits[0]["needed_packets"]
        seconds = needed / (options.cores * rate)
        together = _median(limits, "packets_per_second_together")
        samples_of_limit = [limit["packets_per_second"] for limit in limits]
        summary["raw_limit"] = {
            "needed_packets": needed,
            "needed_gops": limits[0]["needed_gops"],
            "sample_packets": limits[0]["sample_packets"],
            "packets_per_second_one_thread": rate,
            "packets_per_second_all_cores": together,
            "all_cores_seconds": needed / together,
            "samples": samples_of_limit,
            "seconds": seconds,
        }
        if "median" in tools["filmstrip"]:
            ours = tools["filmstrip"]["median"]["seconds"]
            summary["ratios"]["seconds_over_raw_limit"] = ours / seconds
            summary["ratios"]["seconds_over_all_cores_limit"] = ours / (needed / together)
    elif "limit" in errors:
        summary["raw_limit"] = {"error": errors["limit"]}
    return summary


def _median(values: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(value[key] for value in values)


def _max_difference(means: Sequence[float], reference: Sequence[float]) -> float | None:
    """Largest difference of block means in levels of 255; None where the shapes differ."""
    if len(means) != len(reference):
        return None
    return round(max((abs(a - b) for a, b in zip(means, reference, strict=True)), default=0.0), 2)


def _ratios(tools: dict[str, Any]) -> dict[str, Any]:
    """Peers' medians over ours; in the dense case ours counts with normalising, as the peers' results are normalised."""
    if "median" not in tools["filmstrip"]:
        return {}
    ours = total_of(tools["filmstrip"]["median"])
    peers = {tool: total_of(tools[tool]["median"]) for tool in PEERS if "median" in tools.get(tool, {})}
    if not peers:
        return {}
    fastest = min(peers, key=lambda tool: peers[tool][0])
    leanest = min(peers, key=lambda tool: peers[tool][1])
    return {
        "seconds_over_ours": {tool: peers[tool][0] / ours[0] for tool in peers},
        "peak_bytes_over_ours": {tool: peers[tool][1] / ours[1] for tool in peers},
        "fastest_peer": fastest,
        "fastest_peer_seconds_over_ours": peers[fastest][0] / ours[0],
        "leanest_peer": leanest,
        "leanest_peer_peak_bytes_over_ours": peers[leanest][1] / ours[1],
        "leanest_peer_peak_bytes_over_our_uint8_patches": peers[leanest][1]
        / tools["filmstrip"]["median"]["peak_bytes"],
    }


def total_of(median: dict[str, float]) -> tuple[float, float]:
    """(seconds, peak bytes) up to the final result, a second step included."""
    seconds = median["seconds"] + median.get("finish_seconds", 0.0)
    return seconds, median.get("finish_peak_bytes", median["peak_bytes"])


# ----------------------------------------------------------------------------------------------------------------- report


def machine(num_cores: int) -> dict[str, Any]:
    """What it ran on, in words that hold no name and no folder."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1].strip() if cpu else platform.processor(),
        "cores_used": num_cores,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def table(report: dict[str, Any]) -> str:
    """Markdown for the README: a row per case, seconds first, then peak memory."""
    names = {"filmstrip": "Filmstrip", "opencv": "OpenCV", "decord": "decord", "torchcodec": "torchcodec"}
    header = ["", *names.values(), "fastest peer / ours", "ours / raw limit", "all cores"]
    seconds = [header, ["---"] + ["---:"] * (len(header) - 1)]
    memory = [["peak MiB above imports", *names.values(), "leanest peer / ours"], ["---"] + ["---:"] * (len(names) + 1)]
    for case in report["cases"].values():
        best = {name: _best(case["tools"], name) for name in names}
        ratios = case["ratios"]
        seconds.append(
            [
                case["title"],
                *(f"{value[0]:.2f}" if value else "-" for value in best.values()),
                _times(ratios.get("fastest_peer_seconds_over_ours")),
                _times(ratios.get("seconds_over_raw_limit")),
                _times(ratios.get("seconds_over_all_cores_limit")),
            ]
        )
        memory.append(
            [
                case["title"],
                *(f"{value[1] / MEBIBYTE:.0f}" if value else "-" for value in best.values()),
                _times(ratios.get("leanest_peer_peak_bytes_over_ours")),
            ]
        )
    seconds[0][0] = "seconds (median)"
    blocks = ["\n".join("| " + " | ".join(row) + " |" for row in rows) for rows in (seconds, memory)]
    return "\n\n".join([*blocks, _footnote(report)])


def _best(tools: dict[str, Any], name: str) -> tuple[float, float] | None:
    """(seconds, peak bytes) of a tool in the setting in which it is fastest; None if it did not run."""
    totals = [total_of(value["median"]) for tool, value in tools.items() if tool.startswith(name) and "median" in value]
    return min(totals, default=None)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _footnote(report: dict[str, Any]) -> str:
    on = report["machine"]
    parts = [
        f"{on['cores_used']} of {on['cores']} cores of {on['cpu']}",
        f"median of {report['rounds']} interleaved rounds",
    ]
    for case in report["cases"].values():
        for tool, value in case["tools"].items():
            if "note" in value:
                parts.append(f"{tool}, {case['title']}: {value['note']}: {value['rounds']}")
            if (value.get("max_level_difference") or 0) > MAX_LEVEL_DIFFERENCE:
                parts.append(
                    f"{tool}, {case['title']}: other frames than ours (up to {value['max_level_difference']} levels)"
                )
    parts.append(
        "raw limit: the packets that must be decoded over the rate of one thread, times the cores; all cores: over the rate "
        "of a thread on each core at the same time"
    )
    parts += [text for case in report["cases"].values() if (text := _where_time_goes(case))]
    return "; ".join(parts) + "."


def _where_time_goes(case: dict[str, Any]) -> str:
    """Ours by steps, where it takes longer than 1.2 times the limit; and what normalising adds."""
    median = case["tools"]["filmstrip"].get("median", {})
    limit = case.get("raw_limit", {}).get("seconds")
    if not median or not limit or median["seconds"] <= 1.2 * limit:
        return ""
    steps = {"hashing": median["hash_seconds"], "index": median["scan_seconds"]}
    steps["decoding, colours, sizes"] = median["seconds"] - sum(steps.values())
    if "finish_seconds" in median:
        steps["normalising"] = median["finish_seconds"]
    named = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in steps.items())
    return f"{case['title']}: {named} (raw limit {limit:.2f} s)"


# ------------------------------------------------------------------------------------------------------------------- main


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a run, or of one measurement inside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips-folder", type=Path, default=Path("ingest-clips"), help="made clips are kept here")
    parser.add_argument("--source", type=Path, help="real footage to make the clips of; else a test pattern")
    parser.add_argument(
        "--peers-python", default=sys.executable, help="Python with OpenCV, decord, torchcodec, Transformers"
    )
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="cores every tool may use")
    parser.add_argument("--rounds", type=int, help="samples of each tool (default 5; 1 with --quick)")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *QUICK_CASES], help="only these")
    parser.add_argument(
        "--update", action="store_true", help="keep what the results have of cases that are not measured"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny clips, to see that everything works; not written by default"
    )
    parser.add_argument("--output", type=Path, help=f"JSON to write (default results/{RESULTS.name} beside this file)")
    parser.add_argument(
        "--table", nargs="?", type=Path, const=RESULTS, metavar="JSON", help="print a result as Markdown"
    )
    parser.add_argument("--measure", nargs=4, metavar=("TOOL", "CASE", "CLIP", "WARM_UP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.cases = options.cases or list(QUICK_CASES if options.quick else CASES)
    return options


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Make the clips, measure all cases, and say everything needed to judge the numbers."""
    cases = {name: (CASES | QUICK_CASES)[name] for name in options.cases}
    clips = {name: make_clip(case.clip, options.source, options.clips_folder) for name, case in cases.items()}
    warm_up = make_clip(WARM_UP.clip, options.source, options.clips_folder)
    before = time.perf_counter()
    results = {name: run_case(name, case, options, (clips[name], warm_up)) for name, case in cases.items()}
    date = time.strftime("%Y-%m-%d", time.gmtime())
    results = {name: {**result, "date": date, "rounds": options.rounds} for name, result in results.items()}
    return {
        "command": _without_folders(shlex.join(["python", "benchmarks/ingest.py", *arguments])),
        "date": date,
        "machine": machine(options.cores),
        "rounds": options.rounds,
        "run_seconds": time.perf_counter() - before,
        "footage": options.source.name if options.source else "test pattern",
        "definitions": {
            "seconds": "the job without imports and warm-up; finish_seconds: normalising to float32, ours only",
            "peak_bytes": "highest resident memory in the job (finish_peak_bytes: and normalising) above that after imports",
            "raw_limit": "packets from each needed key frame to the last wanted frame of its GOP, divided by (cores x the "
            "rate at which one thread decodes such packets with NONREF skipping, measured in the same rounds)",
            "all_cores_limit": "the same packets divided by the rate of as many threads as cores, all decoding at once",
            "max_level_difference": "largest difference from ours of means over 1/16 of a frame (frames) or 1/8 of a pair "
            "of frames (patches), in levels of 255",
        },
        "cases": results,
    }


def main() -> None:
    """Run what the command line says."""
    options = parse_arguments()
    if options.measure:
        tool, case_name, clip, warm_up = options.measure
        print(json.dumps(measure(tool, (CASES | QUICK_CASES)[case_name], clip, warm_up, options.cores)))
        return
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    report = run(options, sys.argv[1:])
    output = options.output or (None if options.quick else RESULTS)
    if output is None:
        print(json.dumps(report, indent=1))
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        if options.update and output.exists():
            measured = {**json.loads(output.read_text())["cases"], **report["cases"]}
            report["cases"] = {name: measured[name] for name in CASES if name in measured}
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(table(report))


if __name__ == "__main__":
    main()
