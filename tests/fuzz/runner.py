"""Sends damaged files through the loader, several at a time, and checks what is left behind; knows no decoder.

File ``number`` of a run depends on the run's seed and on its number only: any of them can be made and sent again alone.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import ctypes
import dataclasses
import gc
import os
import random
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import psutil

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError
from filmstrip.media.loader import MediaLoader
from filmstrip.types import FramePlan, MediaItem, Modality, PatchLayout, TimeSeriesMetadata, VideoMetadata
from tests.fuzz.mutate import mutate

SEEDS = Path(__file__).parent / "seeds"
NUM_AT_ONCE = 4
LAYOUT = PatchLayout(patch_size=16, temporal_patch_size=2, merge_size=2)
GOOD_SEEDS = ("h264.mp4", "rgb.png", "float32.npy", "sound.flac")
CHECK_EVERY = 250
"""Files between two questions whether the loader still decodes good files."""
GRACE_SECONDS = 10.0
"""What may pass beyond the loader's own limit before a file counts as hung."""
SETTLING_SECONDS = 5.0
CRASH_CODE = "media_decode_crashed"
MAX_RSS_GROWTH_BYTES = 384 << 20

_SUFFIXES = {
    Modality.IMAGE: {".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp", ".avif", ".apng"},
    Modality.TIME_SERIES: {".npy", ".csv", ".wav", ".flac", ".mp3"},
}
_MEDIA_TYPES = {
    Modality.IMAGE: "image/png",
    Modality.VIDEO: "video/mp4",
    Modality.TIME_SERIES: "application/octet-stream",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One damaged file: what it began as and how it is sent."""

    number: int
    seed_name: str
    modality: Modality
    form: str
    """``data`` (a data URL), ``file`` or ``frames`` (a ``data:video/jpeg`` URL with several frames)."""
    data: bytes


@dataclasses.dataclass
class Report:
    """What happened to all files of a run.

    ``outcomes`` counts the files by error code (or "decoded"), ``failures`` has every violation with its file's number, and
    ``worker_crashes`` the files that ended the process which decoded them: each of them was refused with an error as any
    other, so this is no violation, but a defect of a decoder that somebody should look at.
    """

    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    worker_crashes: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_files(self) -> int:
        """Files that were sent."""
        return sum(self.outcomes.values())


def load_seeds() -> dict[str, bytes]:
    """All seed files by name, in a fixed order."""
    return {path.name: path.read_bytes() for path in sorted(SEEDS.iterdir())}


def make_case(seed: int, number: int, seeds: dict[str, bytes]) -> Case:
    """File ``number`` of the run with ``seed``."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(list(seeds))
    others = list(seeds.values())
    modality = _modality_of(name)
    if rng.random() < 0.1:  # what a file is and what it is said to be need not agree
        modality = rng.choice(list(_MEDIA_TYPES))
    form = rng.choice(("data", "file"))
    data = mutate(seeds[name], rng, others)
    if rng.random() < 0.05:
        frames = [mutate(seeds["progressive.jpg"], rng, others) if rng.random() < 0.3 else seeds["turned.jpg"]]
        frames = [rng.choice((*frames, seeds["progressive.jpg"])) for _ in range(rng.choice((1, 2, 5)))]
        data, modality, form, name = b",".join(map(base64.b64encode, frames)), Modality.VIDEO, "frames", "frames"
    return Case(number, name, modality, form, data)


def _modality_of(name: str) -> Modality:
    suffix = Path(name).suffix
    if name == "moving.gif":
        return Modality.VIDEO
    return next((modality for modality, suffixes in _SUFFIXES.items() if suffix in suffixes), Modality.VIDEO)


class Fuzzer:
    """Runs cases through one :class:`MediaLoader`; ``log`` is told before and after each, for what kills the process."""

    def __init__(self, folder: Path, *, limit_seconds: float, log: Callable[[str], None] = lambda _: None) -> None:
        """``folder`` is empty and belongs to this object: what is left in it at the end is a leak."""
        self._folder, self._log, self._limit_seconds = folder, log, limit_seconds
        self._config = MediaConfig(
            num_decode_threads=NUM_AT_ONCE,
            decode_timeout_seconds=limit_seconds,
            max_decode_memory_gb=1.0,
            max_image_pixels=1 << 22,
            max_video_frames=64,
            max_media_bytes=1 << 24,
            max_time_series_values=1 << 22,
        )
        self.seeds = load_seeds()
        self.report = Report()

    async def run(self, cases: Iterable[Case], *, seconds: float = float("inf")) -> Report:
        """Send ``cases``, a few at a time, until they or the seconds are used up; then look for what was left behind."""
        async with self._loader() as loader:
            await self._warm_up(loader)
        before = await _settled(Footprint.take(self._folder), self._folder)
        async with self._loader() as loader:
            await self._send_all(loader, iter(cases), time.monotonic() + seconds)
            await self._check_good(loader, "at the end")
        self.report.failures += (await _settled(before, self._folder)).excess(before)
        return self.report

    @contextlib.asynccontextmanager
    async def _loader(self) -> AsyncIterator[MediaLoader]:
        loader = MediaLoader(self._config)
        try:
            yield loader
        finally:
            await loader.close()

    async def _warm_up(self, loader: MediaLoader) -> None:
        """Every seed once, undamaged: libraries get loaded and allocators reach their usual size."""
        for name, data in self.seeds.items():
            with contextlib.suppress(FilmstripError):  # a codec may be missing here; the good files must do
                await self._load(loader, Case(-1, name, _modality_of(name), "data", data))
        await self._check_good(loader, "at the start")

    async def _send_all(self, loader: MediaLoader, cases: Iterator[Case], deadline: float) -> None:
        finished = 0

        async def work() -> None:
            nonlocal finished
            for case in cases:  # shared by all: each takes the next
                await self._send(loader, case)
                finished += 1
                if finished % CHECK_EVERY == 0:
                    await self._check_good(loader, f"after {finished} files")
                if time.monotonic() > deadline:
                    return

        await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))

    async def _send(self, loader: MediaLoader, case: Case) -> None:
        self._log(f"begin {case.number}")
        where = f"file {case.number} ({case.seed_name} as {case.modality}, {case.form})"
        try:
            await asyncio.wait_for(self._load(loader, case), self._limit_seconds + GRACE_SECONDS)
            outcome = "decoded"
        except FilmstripError as error:
            outcome = error.code
            if outcome == CRASH_CODE:
                self.report.worker_crashes.append(where)
            if error.http_status >= 500:
                self._fail(outcome, f"{where}: {error.code}: {error.message}")
        except asyncio.TimeoutError:
            outcome = "hung"
            self._fail(outcome, f"{where}: no answer {GRACE_SECONDS:g} s after the limit of {self._limit_seconds:g} s")
        except Exception:
            outcome = "unexpected"
            self._fail(outcome, f"{where}: {traceback.format_exc(limit=-6)}")
        self.report.outcomes[outcome] += 1
        self._log(f"end {case.number} {outcome}")

    def _fail(self, outcome: str, text: str) -> None:
        self.report.failures.append(f"{outcome}: {text}")

    async def _load(self, loader: MediaLoader, case: Case) -> None:
        """The real path: fetch, open, plan, read."""
        path = None
        if case.form == "file":
            path = self._folder / f"case-{case.number}"
            path.write_bytes(case.data)
        try:
            fetched = await loader.fetch(MediaItem(case.modality, url=str(path) if path else _data_url(case)))
            opened = await loader.open(fetched)
            try:
                if isinstance(opened.metadata, TimeSeriesMetadata):
                    await loader.read_samples(opened)
                else:
                    await loader.read(opened, plan_for(opened.metadata))
            finally:
                opened.close()
        finally:
            if path is not None:
                path.unlink()

    async def _check_good(self, loader: MediaLoader, when: str) -> None:
        for name in GOOD_SEEDS:
            try:
                await self._load(loader, Case(-1, name, _modality_of(name), "data", self.seeds[name]))
            except Exception:
                self._fail("good file refused", f"{name} {when}: {traceback.format_exc(limit=-3)}")


def plan_for(metadata: object) -> FramePlan:
    """A few small frames: the first, the last and two between."""
    last = metadata.total_num_frames - 1 if isinstance(metadata, VideoMetadata) else 0
    return FramePlan(tuple(sorted({0, last // 3, 2 * last // 3, last})), 64, 64, LAYOUT)


def _data_url(case: Case) -> str:
    if case.form == "frames":
        return f"data:video/jpeg;base64,{case.data.decode()}"
    return f"data:{_MEDIA_TYPES[case.modality]};base64,{base64.b64encode(case.data).decode()}"


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What this process holds: descriptors, threads, children, files of ours, shared-memory names, resident memory."""

    fds: tuple[str, ...]
    threads: tuple[str, ...]
    children: tuple[str, ...]
    files: tuple[str, ...]
    shared_memory: tuple[str, ...]
    rss_bytes: int

    @classmethod
    def take(cls, folder: Path) -> Footprint:
        """Look at this process and at ``folder``, which temporary files go to."""
        process = psutil.Process()
        return cls(
            fds=tuple(sorted(_open_files())),
            # The event loop's own helpers stay as long as it does.
            threads=tuple(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")),
            children=tuple(f"{child.pid} {child.status()}" for child in process.children(recursive=True)),
            files=tuple(str(path) for path in folder.rglob("*") if path.is_file()),
            shared_memory=tuple(sorted(os.listdir("/dev/shm"))),
            rss_bytes=process.memory_info().rss,
        )

    def excess(self, before: Footprint) -> list[str]:
        """What there is more of than ``before``, in words; empty if nothing was left behind."""
        leaks = []
        for name in ("fds", "threads", "children", "files"):
            extra = collections.Counter(getattr(self, name)) - collections.Counter(getattr(before, name))
            if extra:
                leaks.append(f"leak: {extra.total()} {name} more than before: {dict(extra.most_common(8))}")
        ours = {name for name in set(self.shared_memory) - set(before.shared_memory) if "filmstrip" in name}
        if ours:
            leaks.append(f"leak: shared memory {sorted(ours)}")
        growth = self.rss_bytes - before.rss_bytes
        if growth > MAX_RSS_GROWTH_BYTES:
            leaks.append(
                f"leak: {growth >> 20} MiB more resident memory; the limit is {MAX_RSS_GROWTH_BYTES >> 20} MiB"
            )
        return leaks


def _open_files() -> Iterator[str]:
    """What the descriptors of this process refer to, without numbers that differ each time."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the one of the listing itself
            continue
        yield target.split(":[")[0]


async def _settled(before: Footprint, folder: Path) -> Footprint:
    """The footprint once what is ending has ended; what is still there after some seconds is a leak."""
    deadline = time.monotonic() + SETTLING_SECONDS
    while True:
        gc.collect()
        _return_free_memory()
        now = Footprint.take(folder)
        if not now.excess(before) or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.1)


def _return_free_memory() -> None:
    """Let the allocator give back what is free: only what is held is a leak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def fuzz(
    seed: int,
    first: int,
    num_files: int,
    *,
    seconds: float = float("inf"),
    limit_seconds: float = 30.0,
    log: Callable[[str], None] = lambda _: None,
) -> Report:
    """Send files ``first`` to ``first + num_files - 1`` of the run with ``seed``; temporary files go to a new folder."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        usual, tempfile.tempdir = tempfile.tempdir, name
        try:
            fuzzer = Fuzzer(Path(name), limit_seconds=limit_seconds, log=log)
            cases = (make_case(seed, number, fuzzer.seeds) for number in range(first, first + num_files))
            return asyncio.run(fuzzer.run(cases, seconds=seconds))
        finally:
            tempfile.tempdir = usual
