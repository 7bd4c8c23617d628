"""Videos through PyAV (FFmpeg): index scan, then only the groups of pictures that hold a wanted frame; knows no model.

How it finds frames quickly and exactly:

1. Packets are read once without decoding; their times and key flags give every frame's place in display order.
2. A wanted frame is decoded from the last key frame that is neither shown nor coded after it. Frames of one such group of
   pictures (GOP) are one job; jobs run in parallel, each in one thread with one codec thread; other GOPs are never read.
3. Between wanted frames the decoder skips everything that nothing refers to, which changes no pixel of the others.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import av
import av.error
import av.logging
import numpy as np
from av.stream import Discard, Disposition

from filmstrip.errors import MediaDecodeError, MediaTooLargeError
from filmstrip.media.decoders.base import CONTAINER_FORMATS, Consume
from filmstrip.media.mp4 import media_data_ranges, refers_to_other_files
from filmstrip.media.remote import RemoteSource
from filmstrip.media.source import MediaSource
from filmstrip.types import VideoMetadata

_SEEK_BACK_SECONDS = (0.0, 2.0, 10.0)
# Decoders known to skip frames nothing refers to without changing any other. Others get every packet: dav1d, for one, takes
# the setting when it is opened and keeps it.
_CODECS_THAT_SKIP = frozenset({"h264", "hevc", "vp9", "mpeg4", "mpeg2video", "mpeg1video"})
_READ_AHEAD_BYTES = 96 << 10
"""FFmpeg reads a buffer beyond the last packet that it was asked for, and our file object another."""
# Codecs whose packets MP4 stores whole, so that FFmpeg need not look into them to know their times.
_CODECS_TO_SKIM = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "libvpx-vp9"})
_MAX_FIRST_PACKETS = 400
"""Packets tried until the first frame decodes; a clip may begin in the middle of a GOP."""
_MAX_ORDER_CHECK_FRAMES = 64
"""Frames decoded to see whether they come out in the order of their times, where that is in doubt."""
_FALLBACK_FPS = 25.0
_MAX_LEAD_GOPS = 1
# From version 17 on, PyAV converts colours with as many threads as there are cores, started anew for each frame; the
# workers here use the cores already.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
_MAX_TIME = 2**61
"""Times beyond this, in ticks, are nonsense, and sums of two still fit 64 bits."""


@dataclass(frozen=True)
class _Index:
    """What the demuxer says of all packets, in coded order; ``display`` has the coded index of every frame shown, in
    display order, and ``display_times`` its time; ``places`` has position (-1: not known) and size in bytes of every packet.
    ``times_identify`` says whether a time names one frame, so that frames
    can be found by seeking and known by their time; else they are counted from the file's start."""

    times: np.ndarray
    is_key: np.ndarray
    display: np.ndarray
    display_times: np.ndarray
    last_duration: int
    times_identify: bool
    places: np.ndarray


@dataclass
class _Job:
    """Frames to decode from one key frame on: coded index of the key, and display indices with their positions."""

    key: int
    targets: dict[int, list[int]] = field(default_factory=dict)


class PyAVReader:
    """Implements :class:`filmstrip.media.decoders.base.VideoReader`."""

    def __init__(self, source: MediaSource, *, max_pixels: int | None = None) -> None:
        """Scan the index and decode one frame, whose size and rotation no header is trusted for.

        Raises MediaDecodeError, or MediaTooLargeError for frames of more than ``max_pixels``.
        """
        self._source, self._max_pixels = source, max_pixels
        data_ranges = self._look_at_boxes()
        skimming = None
        if isinstance(source, RemoteSource):
            if data_ranges:
                skimming = source.open_skimming(data_ranges)
            else:  # every packet has to be read to know where frames are
                source.will_need([(0, source.num_bytes)])
        with self._open(skimming) as (container, stream):
            if skimming is not None:
                # The tables of such a file say all there is to say about its packets: their contents need not be here.
                skimming.is_skimming = _can_skim(stream)
            self._index = _scan(container, stream)
            if skimming is not None and skimming.is_skimming:
                self._index = dataclasses.replace(self._index, is_key=_keys_in_tables(stream, self._index))
            if not len(self._index.display):
                raise MediaDecodeError("the video has no frames")
            if skimming is None:
                self._describe(container, stream)
        if skimming is not None:
            with self._open() as (container, stream):
                self._describe(container, stream)

    def _look_at_boxes(self) -> list[tuple[int, int]] | None:
        """Where an MP4's media data stand apart from its tables; refuses a file that shows what stands in another."""
        with self._source.open() as file:
            if refers_to_other_files(file, self._source.num_bytes):
                raise MediaDecodeError("the video refers to another file, which is not opened")
            return media_data_ranges(file, self._source.num_bytes)

    def _describe(self, container: Any, stream: Any) -> None:
        """Fill in what the index alone does not say."""
        if self._times_mislead(stream):
            self._index = dataclasses.replace(self._index, times_identify=False)
        self._time_base = float(stream.time_base)
        first = self._first_frame(container, stream)
        self._coded_size, rotation = (first.width, first.height), round(first.rotation / 90) * 90 % 360
        self.is_interlaced = bool(first.interlaced_frame)
        self._index = _without_lead(self._index, first.pts)
        self._first_decodable = self.frame_index(first.pts) or 0
        # GOPs that a job begins before its own: none, until a stream shows that its key frames do not stand alone.
        self._num_lead_gops = 0
        width, height = self._coded_size if rotation % 180 == 0 else self._coded_size[::-1]
        times, fps, duration = _timing(self._index, stream)
        self.metadata = VideoMetadata(
            total_num_frames=len(self._index.display),
            fps=fps,
            duration=duration,
            height=height,
            width=width,
            timestamps=times,
            video_backend="pyav",
            codec=stream.codec_context.name,
            rotation_degrees=rotation,
            has_audio=bool(container.streams.audio),
        )

    def read(
        self,
        frame_indices: Sequence[int],
        consume: Consume,
        num_threads: int,
        cancel: threading.Event | None = None,
    ) -> tuple[int, ...]:
        """See :meth:`filmstrip.media.decoders.base.VideoReader.read`."""
        total = self.metadata.total_num_frames
        if any(not 0 <= index < total for index in frame_indices):
            raise IndexError(f"frame indices must be from 0 to {total - 1}")
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(frame_indices):
            positions.setdefault(index, []).append(position)
        delivery = _Delivery(self, consume, cancel, num_positions=len(frame_indices))
        self._run_jobs(self._jobs(positions), num_threads, delivery)
        self._stand_in(positions, delivery)
        return tuple(delivery.delivered)

    def close(self) -> None:
        """Nothing stays open between calls."""

    @contextlib.contextmanager
    def _open(self, file: Any = None) -> Iterator[tuple[Any, Any]]:
        """A container over the source, or over ``file``, and its best video stream."""
        try:
            with av.open(
                file or self._source.open(),
                mode="r",
                # Not "options": these go to the streams as well, and PyAV before version 18 then crashes the process on
                # files whose streams appear while they are probed (FLV, MPEG program streams).
                container_options={"format_whitelist": CONTAINER_FORMATS},
                io_open=_refuse,
                metadata_errors="ignore",
            ) as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise MediaDecodeError("the file has no video stream")
                if not hasattr(stream, "codec_context") or stream.codec_context is None:
                    raise MediaDecodeError("the video's codec is not supported")
                if stream.disposition & Disposition.attached_pic:
                    raise MediaDecodeError("the file has no video stream, only a cover picture")
                self._check_size(stream.codec_context.width, stream.codec_context.height)
                if self._max_pixels is not None:
                    # A stream may grow later; its decoder then gives no frames. It counts padding, hence the slack.
                    stream.codec_context.options = {"max_pixels": str(4 * self._max_pixels + 2**20)}
                if "mp4" in container.format.name.split(","):
                    for other in container.streams:  # their packets need not be read to find the next of ours
                        if other.index != stream.index:
                            other.discard = Discard.all
                yield container, stream
        except av.error.FFmpegError as error:
            raise MediaDecodeError(f"the video cannot be read: {_reason(error)}") from error
        except EOFError as error:
            raise MediaDecodeError("the video cannot be read: the file ends too early") from error

    def _check_size(self, width: int, height: int) -> None:
        if self._max_pixels is not None and width * height > self._max_pixels:
            raise MediaTooLargeError(
                f"the video's frames have {width} x {height} = {width * height} pixels; the limit is {self._max_pixels} "
                "(max_image_pixels, --max-image-pixels)"
            )

    def _times_mislead(self, stream: Any) -> bool:
        """Whether packets are timed in coded order although their frames are shown in another.

        Copying H.264 or MPEG-4 from a file without times (AVI, a bare stream) into one that needs them makes such files:
        each packet gets the next time, and frames leave the decoder with their times shuffled. They have to be counted.
        """
        index = self._index
        in_coded_order = bool((np.diff(index.times) > 0).all())
        if not (index.times_identify and in_coded_order and stream.codec_context.has_b_frames):
            return False
        with self._open() as (container, first):
            _use_threads(first, 1)
            packets = itertools.chain(_packets(container, first), (None,))
            frames = (frame for packet in packets for frame in _decode(first, packet))
            times = [frame.pts for frame in itertools.islice(frames, _MAX_ORDER_CHECK_FRAMES)]
        return any(earlier is None or later is None or later <= earlier for earlier, later in itertools.pairwise(times))

    def _first_frame(self, container: Any, stream: Any) -> Any:
        """The first frame that decodes, of a size that is allowed."""
        _use_threads(stream, 1)
        packets = self._seek(container, stream, 0) if self._index.times_identify else None
        if packets is not None:
            return self._decode_first(stream, packets)
        with self._open() as (fresh, first):
            _use_threads(first, 1)
            return self._decode_first(first, enumerate(_packets(fresh, first)))

    def _decode_first(self, stream: Any, packets: Iterator[tuple[int, Any]]) -> Any:
        beginning = (packet for _, packet in itertools.islice(packets, _MAX_FIRST_PACKETS))
        for packet in itertools.chain(beginning, (None,)):
            for frame in _decode(stream, packet):
                self._check_size(frame.width, frame.height)
                return frame
        raise MediaDecodeError("no frame of the video can be decoded")

    def _jobs(self, positions: dict[int, list[int]]) -> list[_Job]:
        """One job for each GOP that is needed, the longest first."""
        index = self._index
        if not index.times_identify:
            return [_Job(0, dict(positions))]
        keys = self._keys
        jobs: dict[int, _Job] = {}
        for target in sorted(positions):
            coded = int(index.display[target])
            place = bisect.bisect_right(keys, coded) - 1
            while place > 0 and index.times[keys[place]] > index.times[coded]:
                place -= 1
            key = keys[max(place, 0)]
            jobs.setdefault(key, _Job(key)).targets[target] = positions[target]
        return sorted(jobs.values(), key=self._job_length, reverse=True)

    @functools.cached_property
    def _keys(self) -> list[int]:
        """Coded indices of the key frames, ascending."""
        return np.flatnonzero(self._index.is_key).tolist() or [0]

    def _job_length(self, job: _Job) -> int:
        return max(int(self._index.display[target]) for target in job.targets) - job.key

    def _job_bytes(self, job: _Job) -> tuple[int, int] | None:
        """Where the packets of a job stand in the file, if the container says so."""
        last = max(int(self._index.display[target]) for target in job.targets)
        places = self._index.places[job.key : last + 1]
        if not len(places) or (places[:, 0] < 0).any():
            return None
        stop = int(places.sum(axis=1).max()) + _READ_AHEAD_BYTES
        return int(places[:, 0].min()), min(stop, self._source.num_bytes)

    def _run_jobs(self, jobs: list[_Job], num_threads: int, delivery: _Delivery) -> None:
        if isinstance(self._source, RemoteSource):
            self._source.will_need([span for job in jobs if (span := self._job_bytes(job)) is not None])
        num_workers = max(1, min(num_threads, len(jobs)))
        # Fewer GOPs than threads: let the codec itself use what is left.
        codec_threads = -(-num_threads // num_workers) if len(jobs) < num_threads else 1
        pending: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        for job in jobs:
            pending.put(job)

        begin = threading.Event()

        def work() -> None:
            begin.wait()
            try:
                delivery.check()
                with self._open() as (container, stream):
                    _use_threads(stream, codec_threads)
                    while True:
                        delivery.check()
                        self._run_job(container, stream, pending.get_nowait(), delivery)
            except queue.Empty:
                return
            except BaseException as error:
                delivery.fail(error)

        if num_workers == 1:
            begin.set()
            work()
        else:
            with ThreadPoolExecutor(num_workers, thread_name_prefix="filmstrip-decode") as threads:
                try:
                    futures = [threads.submit(work) for _ in range(num_workers)]
                    # Not before all are known: Ctrl-C inside submit() leaves a thread that the pool does not wait for.
                    begin.set()
                    wait(futures)
                except BaseException as error:  # Ctrl-C: the threads must end before the pool can
                    delivery.fail(error)
                    begin.set()
                    raise
        delivery.check()

    def _run_job(self, container: Any, stream: Any, job: _Job, delivery: _Delivery) -> None:
        """Decode one job; once more, from one GOP earlier and with one codec thread, if frames that were wanted are missing.

        A stream that refreshes its picture bit by bit (x264's intra-refresh, usual in live streams) has key frames from
        which it is whole only after some more frames; FFmpeg holds back those before. And where FFmpeg decodes with several
        threads, a broken packet takes sound frames with it that were waiting in the others.
        """
        lead = self._num_lead_gops
        start = self._earlier_key(job.key, lead)
        earlier = self._earlier_key(start, 1)
        can_retry = earlier < start or stream.codec_context.thread_count > 1
        missing = self._decode_from(container, stream, start, job, delivery, stands_in=not can_retry)
        if missing and can_retry:
            with self._open() as (fresh, again):
                _use_threads(again, 1)
                retry = _Job(job.key, missing)
                still_missing = self._decode_from(fresh, again, earlier, retry, delivery, stands_in=True)
            if len(still_missing) < len(missing) and stream.codec_context.thread_count == 1:
                self._num_lead_gops = min(lead + 1, _MAX_LEAD_GOPS)

    def _earlier_key(self, key: int, num_gops: int) -> int:
        place = bisect.bisect_left(self._keys, key)
        return self._keys[max(place - num_gops, 0)] if num_gops and place else key

    def _decode_from(
        self, container: Any, stream: Any, key: int, job: _Job, delivery: _Delivery, *, stands_in: bool
    ) -> dict[int, list[int]]:
        """Decode a job's frames from ``key`` on, by a seek if that lands where it should, else from the file's start.

        Returns the frames that did not come out; with ``stands_in`` others may have been delivered in their place.
        """
        collector = _Collector(self, job, delivery, stands_in=stands_in)
        packets = self._seek(container, stream, key) if self._index.times_identify and key > 0 else None
        if packets is not None:
            self._decode_job(stream, packets, job, collector, delivery)
            return collector.missing
        with self._open() as (fresh, first):
            _use_threads(first, stream.codec_context.thread_count)
            packets = itertools.islice(enumerate(_packets(fresh, first)), key, None)
            self._decode_job(first, packets, job, collector, delivery)
        return collector.missing

    def _decode_job(
        self, stream: Any, packets: Iterator[tuple[int, Any]], job: _Job, collector: _Collector, delivery: _Delivery
    ) -> None:
        index = self._index
        wanted = {int(index.display[target]) for target in job.targets}
        last = max(wanted)
        counting = not index.times_identify
        skips = not counting and stream.codec_context.name in _CODECS_THAT_SKIP
        for coded, packet in packets:
            delivery.check()
            stream.codec_context.skip_frame = "NONREF" if skips and coded not in wanted else "DEFAULT"
            for frame in _decode(stream, packet):
                collector.add(frame)
            if (coded >= last and not counting) or collector.is_complete:
                break
        for frame in _decode(stream, None):
            collector.add(frame)
        collector.finish()

    def _seek(self, container: Any, stream: Any, key: int) -> Iterator[tuple[int, Any]] | None:
        """Packets from a key frame on, numbered in coded order; None if no seek finds it.

        A seek goes by the key frame's presentation time; by decoding time it may land one group early. In MPEG-TS it may
        land late and is tried again from further back.
        """
        time = int(self._index.times[key])
        for back in _SEEK_BACK_SECONDS:
            try:
                time_before = max(time - round(back / self._time_base), -_MAX_TIME)
                container.seek(time_before, stream=stream, backward=True, any_frame=False)
            except av.error.FFmpegError:
                continue
            packets = _packets(container, stream)
            for packet in packets:
                if packet.pts == time and packet.is_keyframe:
                    return enumerate(itertools.chain([packet], packets), key)
                if packet.is_keyframe and packet.pts is not None and packet.pts > time:
                    break
        return None

    def _stand_in(self, positions: dict[int, list[int]], delivery: _Delivery) -> None:
        """Give positions that got no frame the nearest one that was decoded, before them if there is any."""
        missing = sorted(index for index, where in positions.items() if delivery.delivered[where[0]] < 0)
        if not missing:
            return
        # Where none of the wanted decodes, the one that did when the file was opened is at hand.
        good = sorted({index for index in delivery.delivered if index >= 0}) or [self._first_decodable]
        substitutes: dict[int, list[int]] = {}
        for index in missing:
            place = bisect.bisect_left(good, index)
            substitutes.setdefault(good[place - 1] if place else good[0], []).extend(positions[index])
        self._run_jobs(self._jobs(substitutes), 1, delivery)
        if any(index < 0 for index in delivery.delivered):
            raise MediaDecodeError("the video does not decode the same way twice")

    def frame_index(self, pts: int | None) -> int | None:
        """Display index of a decoded frame by its time; None if the scan saw no such frame."""
        if pts is None:
            return None
        times = self._index.display_times
        place = int(np.searchsorted(times, pts))
        return place if place < len(times) and times[place] == pts else None

    def to_rgb(self, frame: Any) -> np.ndarray:
        """uint8 RGB (height, width, 3) as displayed, always of the size in ``metadata``."""
        width, height = self._coded_size
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height, **_ONE_THREAD)
        turns = self.metadata.rotation_degrees // 90
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


class _Delivery:
    """Where frames go, shared by all threads of one read."""

    def __init__(
        self, reader: PyAVReader, consume: Consume, cancel: threading.Event | None, *, num_positions: int
    ) -> None:
        self._reader, self._consume, self._cancel = reader, consume, cancel
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.delivered = [-1] * num_positions

    def fail(self, error: BaseException) -> None:
        """Remember the first error, which ends all threads."""
        with self._lock:
            self._error = self._error or error

    def check(self) -> None:
        """Raise what any thread failed with, or InterruptedError if the read was cancelled."""
        if self._error is not None:
            raise self._error
        if self._cancel is not None and self._cancel.is_set():
            raise InterruptedError("reading the video was cancelled")

    def give(self, positions: list[int], index: int, frame: Any) -> None:
        """Hand one decoded frame over to every position that wants it."""
        rgb = self._reader.to_rgb(frame)
        for position in positions:
            self._consume(position, rgb)
            self.delivered[position] = index


class _Collector:
    """Frames of one job as the decoder puts them out: picks the wanted, replaces the missing.

    ``missing`` has the wanted frames that did not come out. With ``stands_in`` the last frame before each takes its place;
    where there is none, or without it, their positions stay open.
    """

    def __init__(self, reader: PyAVReader, job: _Job, delivery: _Delivery, *, stands_in: bool) -> None:
        self._reader, self._delivery, self._stands_in = reader, delivery, stands_in
        self._wanted = sorted(job.targets.items())
        self._next = 0
        self._last: tuple[int, Any] | None = None
        self._counter: Iterator[int] | None = None if reader._index.times_identify else iter(range(2**62))
        self.missing: dict[int, list[int]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every wanted frame has been given or replaced."""
        return self._next == len(self._wanted)

    def add(self, frame: Any) -> None:
        """Take the next frame in display order."""
        index = next(self._counter) if self._counter is not None else self._reader.frame_index(frame.pts)
        if index is None:
            return
        while not self.is_complete and self._wanted[self._next][0] < index:
            self._replace()
        if not self.is_complete and self._wanted[self._next][0] == index:
            self._delivery.give(self._wanted[self._next][1], index, frame)
            self._next += 1
        self._last = (index, frame)

    def finish(self) -> None:
        """The job's packets are used up: what is still wanted is missing."""
        while not self.is_complete:
            self._replace()

    def _replace(self) -> None:
        index, positions = self._wanted[self._next]
        self._next += 1
        self.missing[index] = positions
        if self._stands_in and self._last is not None:
            self._delivery.give(positions, *self._last)


def _scan(container: Any, stream: Any) -> _Index:
    """Read all packets of the stream without decoding."""
    pts: list[int | None] = []
    dts: list[int | None] = []
    durations: list[int] = []
    is_key: list[bool] = []
    shown: list[bool] = []
    places: list[tuple[int, int]] = []
    for packet in _packets(container, stream):
        places.append((-1 if packet.pos is None else packet.pos, packet.size))
        pts.append(packet.pts)
        dts.append(packet.dts)
        durations.append(packet.duration or 0)
        is_key.append(packet.is_keyframe)
        shown.append(not packet.is_discard)
    coded = np.flatnonzero(np.asarray(shown, bool))
    last_duration = next((duration for duration in reversed(durations) if duration), 0)
    times_identify = _times_identify(container, stream, pts, dts)
    if times_identify:
        times = np.asarray(pts, np.int64)
        display = coded[np.argsort(times[coded], kind="stable")]
    else:
        times = _running_times(pts, dts, durations)
        display = coded
    packet_places = np.asarray(places, np.int64).reshape(-1, 2)
    return _Index(
        times, np.asarray(is_key, bool), display, times[display], last_duration, times_identify, packet_places
    )


def _can_skim(stream: Any) -> bool:
    """Whether packets can be listed without their contents: PyAV from version 16 on tells the container's own tables."""
    return stream.codec_context.name in _CODECS_TO_SKIM and len(getattr(stream, "index_entries", ())) > 0


def _keys_in_tables(stream: Any, index: _Index) -> np.ndarray:
    """Which packets the container calls key frames. FFmpeg's parsers overrule it, but cannot where contents are missing."""
    keys = {entry.pos for entry in stream.index_entries if entry.is_keyframe}
    return np.asarray([position in keys for position in index.places[:, 0].tolist()], bool)


def _times_identify(container: Any, stream: Any, pts: list[int | None], dts: list[int | None]) -> bool:
    """Whether every packet has a time, and the times tell frames apart and put them in order.

    They do not where a container has none (bare H.264, some Matroska copies), where its clock is coarser than the frame
    rate, and where files were appended to one another so that the clock begins anew.
    """
    if any(time is None or abs(time) > _MAX_TIME for time in pts) or len(set(pts)) < len(pts):
        return False
    clock = [time for time in dts if time is not None]
    if any(later < earlier for earlier, later in itertools.pairwise(clock)):
        return False
    # AVI stores frames in coded order without a time. FFmpeg sees the order of display in MPEG-4's packets, but numbers
    # those of H.264 and its like just as they come.
    is_avi = "avi" in container.format.name.split(",")
    in_coded_order = all(later > earlier for earlier, later in itertools.pairwise(pts))  # type: ignore[operator]
    return not (is_avi and in_coded_order and stream.codec_context.has_b_frames)


def _running_times(pts: list[int | None], dts: list[int | None], durations: list[int]) -> np.ndarray:
    """Times for frames that are counted: the decoding clock, carried on by durations where it is silent or steps back."""
    now = 0
    times: list[int] = []
    before: int | None = None
    for shown, decoded, duration in zip(pts, dts, [0, *durations], strict=False):
        clock = shown if decoded is None else decoded
        if clock is not None and before is not None and 0 <= clock - before <= _MAX_TIME - now:
            now += clock - before
        elif times:
            now += duration or 1
        before = clock
        times.append(now)
    return np.asarray(times, np.int64)


def _without_lead(index: _Index, first_pts: int | None) -> _Index:
    """The index without what a cut left over before the first key frame's picture and no frame came out of.

    These are packets coded before that key frame, and in HEVC also the pictures coded after it, shown before it, that refer
    to what was cut off.
    """
    if not index.times_identify or first_pts is None or not index.is_key.any():
        return index
    stays = index.display_times >= min(first_pts, int(index.times[np.argmax(index.is_key)]))
    return dataclasses.replace(index, display=index.display[stays], display_times=index.display_times[stays])


def _timing(index: _Index, stream: Any) -> tuple[np.ndarray, float, float]:
    """Timestamps in seconds, frames per second, duration in seconds.

    Where the times are those of a constant rate, up to the container's rounding, they are exactly ``index / fps``: what
    processors compute that know nothing but the rate.
    """
    tick = float(stream.time_base)
    times = index.display_times
    seconds = (times - times[0]) * tick
    numbers = np.arange(len(seconds))
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and np.abs(seconds - numbers / float(rate)).max() <= tick * 1.001:
            return numbers / float(rate), float(rate), len(seconds) / float(rate)
    typical = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
    duration = float(seconds[-1]) + (index.last_duration * tick or typical or 1 / _FALLBACK_FPS)
    return seconds, len(seconds) / duration, duration


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets of the stream, from where the container stands, until the file ends or breaks.

    Where a stream appears midway, as in broadcasts, PyAV raises IndexError after the last packet: it ends every stream that
    the file has by then, and knows those it had at the beginning.
    """
    with contextlib.suppress(av.error.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet


def _decode(stream: Any, packet: Any) -> list[Any]:
    """Frames that come out for a packet (None: the end); a broken packet gives none."""
    try:
        return stream.codec_context.decode(packet)
    except (av.error.FFmpegError, EOFError):
        return []


def _use_threads(stream: Any, num_threads: int) -> None:
    stream.codec_context.thread_type = "FRAME" if num_threads > 1 else "NONE"
    stream.codec_context.thread_count = num_threads


def _refuse(_url: str, _flags: int, _options: dict[str, Any]) -> Any:
    """A container may name other files or addresses; none is ever opened."""
    raise PermissionError("the video refers to another file, which is not opened")


def _reason(error: av.error.FFmpegError) -> str:
    """FFmpeg's word for the error, without the name of our file object."""
    return error.strerror or type(error).__name__
