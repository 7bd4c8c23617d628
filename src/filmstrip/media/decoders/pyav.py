"""Videos through PyAV (FFmpeg): index scan, then only the groups of pictures that hold a wanted frame; knows no model.

How it finds frames quickly and exactly:

1. Packets are read once without decoding; their times and key flags give every frame's place in display order
   (:mod:`~filmstrip.media.decoders.packet_index`). Where they are known to mislead, a few frames are decoded to see.
2. A wanted frame is decoded from the last key frame that is neither shown nor coded after it. Frames of one such group of
   pictures (GOP) are one job; jobs run in parallel, each in one thread with one codec thread; other GOPs are never read.
3. Between wanted frames the decoder skips everything that nothing refers to, which changes no pixel of the others.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import math
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
from filmstrip.media.decoders.packet_index import (
    MAX_TIME,
    Packets,
    can_skim,
    counted,
    index_of,
    keys_in_tables,
    packets_of,
    scan,
    second_fields,
    timing,
    without_lead,
    without_lost_packets,
)
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
_MAX_FIRST_PACKETS = 400
"""Packets tried until the first frame decodes; a clip may begin in the middle of a GOP."""
_MAX_ORDER_CHECK_FRAMES = 64
"""Frames decoded to see whether they come out in the order of their times, where that is in doubt."""
_MAX_KEY_CHECK_FRAMES = 8
"""Frames decoded to see whether the container is right to call all of them key frames."""
_MAX_DELAY = 16
"""Frames that H.264 and HEVC may hold back until they are shown, the most of all codecs."""
_CONTAINERS_WITHOUT_TIMES = frozenset({"avi", "mpegvideo", "asf"})
"""Where FFmpeg's demuxers work out when a frame is shown from the order and the kinds of frames."""
_MAX_LEAD_GOPS = 1
# From version 17 on, PyAV converts colours with as many threads as there are cores, started anew for each frame; the
# workers here use the cores already.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


@dataclass
class _Job:
    """Frames to decode from one key frame on: coded index of the key, and display indices with their positions."""

    key: int
    targets: dict[int, list[int]] = field(default_factory=dict)


class PyAVReader:
    """Implements :class:`filmstrip.media.decoders.base.VideoReader`.

    ``is_interlaced`` says whether the first frame is made of two fields.
    """

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
                skimming.is_skimming = can_skim(stream)
            scanned = scan(container, stream)
            completes = second_fields(scanned, stream)
            if completes.any() and (skimming is not None or not self._come_as_pairs(completes)):
                completes[:] = False
            self._index = index_of(scanned, container, stream, completes)
            if skimming is not None and skimming.is_skimming:
                self._index = dataclasses.replace(self._index, is_key=keys_in_tables(stream, self._index))
            if not len(self._index.display):
                raise MediaDecodeError("the video has no frames")
            if skimming is None:
                self._describe(container, stream, scanned)
        if skimming is not None:
            with self._open() as (container, stream):
                self._describe(container, stream, scanned)

    def _look_at_boxes(self) -> list[tuple[int, int]] | None:
        """Where an MP4's media data stand apart from its tables; refuses a file that shows what stands in another."""
        with self._source.open() as file:
            if refers_to_other_files(file, self._source.num_bytes):
                raise MediaDecodeError("the video refers to another file, which is not opened")
            return media_data_ranges(file, self._source.num_bytes)

    def _describe(self, container: Any, stream: Any, scanned: Packets) -> None:
        """Fill in what the index alone does not say."""
        if self._keys_mislead(stream):
            only_first = np.arange(len(self._index.is_key)) == 0
            self._index = dataclasses.replace(self._index, is_key=only_first)
        if self._times_mislead(container, stream):
            self._index = counted(self._index, scanned, stream)
        self._time_base = float(stream.time_base)
        first = self._first_frame(container, stream)
        self._coded_size = (first.width, first.height)
        rotation, is_mirrored = _orientation(first)
        self.is_interlaced = bool(first.interlaced_frame)
        if self._index.times_identify:
            self._index = without_lead(self._index, first.pts)
            self._first_decodable = self.frame_index(first.pts) or 0
        else:
            self._index = without_lost_packets(self._index, self._first_packets())
            self._first_decodable = 0
        # GOPs that a job begins before its own: none, until a stream shows that its key frames do not stand alone.
        self._num_lead_gops = 0
        width, height = self._coded_size if rotation % 180 == 0 else self._coded_size[::-1]
        times, fps, duration = timing(self._index, stream)
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
            is_mirrored=is_mirrored,
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

    def _come_as_pairs(self, completes: np.ndarray) -> bool:
        """Whether frames come out of first fields only, where two packets are held for the fields of one."""
        with self._decoding(numbered=True) as frames:
            packets = [frame.pts for frame in itertools.islice(frames, _MAX_ORDER_CHECK_FRAMES)]
        return bool(packets) and not any(packet is None or completes[packet] for packet in packets)

    def _keys_mislead(self, stream: Any) -> bool:
        """Whether the container calls every packet a key frame although the codec's frames refer to one another.

        So does AVI whose index was lost, Matroska and AVI with H.263, MP4 without a table of key frames.
        """
        is_key = self._index.is_key
        if len(is_key) < 2 or not is_key.all() or stream.codec_context.codec.intra_only:
            return False
        with self._decoding() as frames:
            return not all(frame.key_frame for frame in itertools.islice(frames, _MAX_KEY_CHECK_FRAMES))

    def _times_mislead(self, container: Any, stream: Any) -> bool:
        """Whether packets are timed in another order than their frames are shown in.

        Copying H.264 or MPEG-4 from a file without times (AVI, a bare stream) into one that needs them makes such files:
        each packet gets the next time, and frames leave the decoder with their times shuffled. In the containers that have
        no times FFmpeg guesses them, not always right.
        """
        index = self._index
        guessed = not _CONTAINERS_WITHOUT_TIMES.isdisjoint(container.format.name.split(","))
        in_coded_order = bool((np.diff(index.times[index.display]) > 0).all() and (np.diff(index.display) > 0).all())
        if not (index.times_identify and (guessed or in_coded_order) and stream.codec_context.has_b_frames):
            return False
        with self._decoding() as frames:
            times = [frame.pts for frame in itertools.islice(frames, _MAX_ORDER_CHECK_FRAMES)]
        return any(earlier is None or later is None or later <= earlier for earlier, later in itertools.pairwise(times))

    def _first_packets(self) -> list[int]:
        """Coded indices of the packets that the first frames came from, in the order they come out."""
        with self._decoding(numbered=True) as frames:
            return [frame.pts for frame in itertools.islice(frames, _MAX_DELAY + 4)]

    @contextlib.contextmanager
    def _decoding(self, *, numbered: bool = False) -> Iterator[Iterator[Any]]:
        """Frames from the file's start on, decoded in one thread.

        With ``numbered``, a frame's time is the coded index of its packet.
        """
        with self._open() as (container, stream):
            _use_threads(stream, 1)
            packets = packets_of(container, stream)
            ended = itertools.chain(_numbered(packets) if numbered else packets, (None,))
            yield (frame for packet in ended for frame in _decode(stream, packet))

    def _first_frame(self, container: Any, stream: Any) -> Any:
        """The first frame that decodes, of a size that is allowed."""
        _use_threads(stream, 1)
        packets = self._seek(container, stream, 0) if self._index.can_seek else None
        if packets is not None:
            return self._decode_first(stream, packets)
        with self._open() as (fresh, first):
            _use_threads(first, 1)
            return self._decode_first(first, enumerate(packets_of(fresh, first)))

    def _decode_first(self, stream: Any, packets: Iterator[tuple[int, Any]]) -> Any:
        # A recording may begin anywhere in a GOP, and a GOP be long: what is before its first key frame does not count.
        last = (self._keys[0] if self._index.is_key.any() else 0) + _MAX_FIRST_PACKETS
        beginning = (packet for _, packet in itertools.takewhile(lambda numbered: numbered[0] < last, packets))
        for packet in itertools.chain(beginning, (None,)):
            for frame in _decode(stream, packet):
                self._check_size(frame.width, frame.height)
                return frame
        raise MediaDecodeError("no frame of the video can be decoded")

    def _jobs(self, positions: dict[int, list[int]]) -> list[_Job]:
        """One job for each GOP that is needed, the longest first."""
        index = self._index
        if not index.can_seek:
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
        packets = self._seek(container, stream, key) if self._index.can_seek and key > 0 else None
        if packets is not None:
            self._decode_job(stream, packets, job, collector, delivery)
            return collector.missing
        with self._open() as (fresh, first):
            _use_threads(first, stream.codec_context.thread_count)
            packets = itertools.islice(enumerate(packets_of(fresh, first)), key, None)
            self._decode_job(first, packets, job, collector, delivery)
        return collector.missing

    def _decode_job(
        self, stream: Any, packets: Iterator[tuple[int, Any]], job: _Job, collector: _Collector, delivery: _Delivery
    ) -> None:
        index = self._index
        wanted = {int(index.display[target]) for target in job.targets}
        wanted |= {coded + 1 for coded in wanted if coded + 1 < len(index.completes) and index.completes[coded + 1]}
        last = max(wanted)
        counting = not index.times_identify
        skips = not counting and stream.codec_context.name in _CODECS_THAT_SKIP
        for coded, packet in packets:
            delivery.check()
            if counting:
                _number(packet, coded)
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
                time_before = max(time - round(back / self._time_base), -MAX_TIME)
                container.seek(time_before, stream=stream, backward=True, any_frame=False)
            except av.error.FFmpegError:
                continue
            packets = packets_of(container, stream)
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
        return np.ascontiguousarray(as_displayed(pixels, self.metadata))


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
        self._counter = None if reader._index.times_identify else _Counter(reader._index.display)
        self.missing: dict[int, list[int]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every wanted frame has been given or replaced."""
        return self._next == len(self._wanted)

    def add(self, frame: Any) -> None:
        """Take the next frame in display order."""
        if self._counter is None:
            self._take(self._reader.frame_index(frame.pts), frame)
        else:
            for index, counted in self._counter.add(frame):
                self._take(index, counted)

    def finish(self) -> None:
        """The job's packets are used up: what is still wanted is missing."""
        for index, frame in self._counter.finish() if self._counter is not None else ():
            self._take(index, frame)
        while not self.is_complete:
            self._replace()

    def _take(self, index: int | None, frame: Any) -> None:
        if index is None:
            return
        while not self.is_complete and self._wanted[self._next][0] < index:
            self._replace()
        if not self.is_complete and self._wanted[self._next][0] == index:
            self._delivery.give(self._wanted[self._next][1], index, frame)
            self._next += 1
        self._last = (index, frame)

    def _replace(self) -> None:
        index, positions = self._wanted[self._next]
        self._next += 1
        self.missing[index] = positions
        if self._stands_in and self._last is not None:
            self._delivery.give(positions, *self._last)


class _Counter:
    """Display indices of frames that are known by their packets only, from the file's start on.

    A frame's index is how many were shown before it, those included that did not come out. Which did not is known once
    later ones did: a decoder may hold a frame back while it puts out others that were coded after it.
    """

    def __init__(self, display: np.ndarray) -> None:
        self._display = display
        self._waiting: collections.deque[Any] = collections.deque()
        self._num_before = 0
        self._latest = -1
        self._index = -1

    def add(self, frame: Any) -> Iterator[tuple[int, Any]]:
        """The frame, whose time is its packet's number, goes in; frames whose index is certain come out."""
        self._waiting.append(frame)
        if len(self._waiting) > _MAX_DELAY:
            yield self._count()

    def finish(self) -> Iterator[tuple[int, Any]]:
        """All frames that are left: there will be no more."""
        while self._waiting:
            yield self._count()

    def _count(self) -> tuple[int, Any]:
        frame = self._waiting.popleft()
        self._latest = max(self._latest, -1 if frame.pts is None else frame.pts)
        num_coded = int(np.searchsorted(self._display, self._latest, side="right"))
        num_waiting = sum(later.pts is not None and later.pts < self._latest for later in self._waiting)
        # All that was coded up to here was shown before, but for this frame and those that still wait.
        self._index = max(num_coded - 1 - num_waiting, self._index + 1)
        return self._index, frame


def _numbered(packets: Iterator[Any]) -> Iterator[Any]:
    for coded, packet in enumerate(packets):
        _number(packet, coded)
        yield packet


def _number(packet: Any, coded: int) -> None:
    """Give a packet its number for a time: decoders hand it on to the frame they make of it."""
    packet.pts = packet.dts = coded


def _orientation(frame: Any) -> tuple[int, bool]:
    """By how many degrees counterclockwise, a multiple of 90, a picture is turned, and whether it is mirrored before that.

    The display matrix maps a point (x, y), y downwards, to (a x + c y, b x + d y) [ISO 14496-12, 8.3.2]: its determinant
    is negative where it mirrors.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(np.float64).tolist()
    is_mirrored = a * d - b * c < 0
    if is_mirrored:
        a, b = -a, -b
    return round(math.degrees(math.atan2(c - b, a + d)) / 90) * 90 % 360, is_mirrored


def as_displayed(pixels: np.ndarray, metadata: VideoMetadata) -> np.ndarray:
    """A view of a decoded picture (height, width, 3), mirrored and turned as the file says."""
    return np.rot90(pixels[:, ::-1] if metadata.is_mirrored else pixels, metadata.rotation_degrees // 90)


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
