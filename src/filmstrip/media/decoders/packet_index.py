"""Where every frame of a video is and when it is shown, from its packets as PyAV (FFmpeg) demuxes them; decodes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import av.error
import numpy as np

# Codecs whose packets MP4 stores whole, so that FFmpeg need not look into them to know their times.
_CODECS_TO_SKIM = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "libvpx-vp9"})
_MAX_STEP_BACK_SECONDS = 1
"""A decoding clock that steps back further has begun anew."""
_FALLBACK_FPS = 25.0
MAX_TIME = 2**61
"""Times beyond this, in ticks, are nonsense, and sums of two still fit 64 bits."""


@dataclass(frozen=True)
class PacketIndex:
    """What the demuxer says of all packets, in coded order.

    ``display`` has the coded index of every frame shown, in display order, and ``display_times`` its time; ``places`` has
    position (-1: not known) and size in bytes of every packet; ``completes`` marks packets that are the second half of the
    frame before. ``times_identify`` says whether a time names one frame, so that frames that come out are known by it; else
    by the packets they came from. ``can_seek`` says whether a time also names one packet, so that frames can be found by
    seeking; else all is decoded from the file's start.
    """

    times: np.ndarray
    is_key: np.ndarray
    display: np.ndarray
    display_times: np.ndarray
    last_duration: int
    times_identify: bool
    can_seek: bool
    places: np.ndarray
    completes: np.ndarray


@dataclass
class Packets:
    """What the scan keeps of all packets, in coded order; ``places`` are (position or -1, bytes)."""

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    is_shown: list[bool] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


def scan(container: Any, stream: Any) -> Packets:
    """Read all packets of the stream without decoding."""
    scanned = Packets()
    for packet in packets_of(container, stream):
        scanned.pts.append(packet.pts)
        scanned.dts.append(packet.dts)
        scanned.durations.append(packet.duration or 0)
        scanned.is_key.append(packet.is_keyframe)
        scanned.is_shown.append(not packet.is_discard)
        scanned.places.append((-1 if packet.pos is None else packet.pos, packet.size))
    return scanned


def second_fields(scanned: Packets, stream: Any) -> np.ndarray:
    """Which packets seem to be the second field of a frame whose first is the packet before; bool (num_packets,).

    H.264 may code the two fields of a frame as pictures of their own, as broadcasts and camcorders do. FFmpeg's parser makes
    two packets of them, each as long as half a frame. A container may give both a time or the first only.
    """
    seconds = np.zeros(len(scanned.pts), bool)
    rate = stream.guessed_rate or stream.average_rate
    if stream.codec_context.name != "h264" or not rate:
        return seconds
    half_ticks = float(1 / (2 * rate * stream.time_base))
    is_field = np.abs(np.asarray(scanned.durations, np.float64) - half_ticks) <= 0.1 * half_ticks
    firsts_only = None in scanned.pts and any(time is not None for time in scanned.pts)
    is_open = False
    for place in np.flatnonzero(is_field).tolist():
        is_open = is_open and bool(is_field[place - 1])
        has_own_time = firsts_only and scanned.pts[place] is not None
        seconds[place] = is_open and not scanned.is_key[place] and not has_own_time
        is_open = not seconds[place]
    return seconds


def index_of(scanned: Packets, container: Any, stream: Any, completes: np.ndarray) -> PacketIndex:
    """Where every frame is and when it is shown; ``completes`` as in :class:`PacketIndex`."""
    is_key = np.asarray(scanned.is_key, bool) & ~completes
    shown = np.flatnonzero(np.asarray(scanned.is_shown, bool) & ~completes)
    last_duration = next((duration for duration in reversed(scanned.durations) if duration), 0)
    times = np.asarray([0 if time is None or abs(time) > MAX_TIME else time for time in scanned.pts], np.int64)
    display = shown[np.argsort(times[shown], kind="stable")]
    hidden = [scanned.pts[place] for place in np.flatnonzero(~np.asarray(scanned.is_shown, bool)).tolist()]
    can_seek = None not in hidden and len({*hidden, *times[shown].tolist()}) == len(hidden) + len(shown)
    places = np.asarray(scanned.places, np.int64).reshape(-1, 2)
    index = PacketIndex(times, is_key, display, times[display], last_duration, True, can_seek, places, completes)
    identified = _times_identify(scanned, shown, is_key, container, stream)
    return index if identified else counted(index, scanned, stream)


def counted(index: PacketIndex, scanned: Packets, stream: Any) -> PacketIndex:
    """The index of frames that are known by their packets only: shown one after another, at the times of a running clock."""
    times, display = _running_times(scanned, stream), np.sort(index.display)
    return dataclasses.replace(
        index, times=times, display=display, display_times=times[display], times_identify=False, can_seek=False
    )


def can_skim(stream: Any) -> bool:
    """Whether packets can be listed without their contents: PyAV from version 16 on tells the container's own tables."""
    return stream.codec_context.name in _CODECS_TO_SKIM and len(getattr(stream, "index_entries", ())) > 0


def keys_in_tables(stream: Any, index: PacketIndex) -> np.ndarray:
    """Which packets the container calls key frames. FFmpeg's parsers overrule it, but cannot where contents are missing."""
    keys = {entry.pos for entry in stream.index_entries if entry.is_keyframe}
    return np.asarray([position in keys for position in index.places[:, 0].tolist()], bool)


def _times_identify(scanned: Packets, shown: np.ndarray, is_key: np.ndarray, container: Any, stream: Any) -> bool:
    """Whether every frame shown has a time, and the times tell frames apart and put them in order.

    They do not where a container has none (bare H.264, some Matroska copies), where its clock is coarser than the frame
    rate, and where files were appended to one another so that the clock begins anew.
    """
    pts = [scanned.pts[place] for place in shown.tolist()]
    if any(time is None or abs(time) > MAX_TIME for time in pts) or len(set(pts)) < len(pts):
        return False
    keys = [scanned.pts[place] for place in np.flatnonzero(is_key).tolist() if scanned.is_shown[place]]
    if any(later < earlier for earlier, later in itertools.pairwise(keys)):  # type: ignore[operator]
        return False
    # FFmpeg's own decoding times may step back a little where it learns late that there are B-frames; a clock steps far.
    clock = [time for time in scanned.dts if time is not None]
    step_back = round(_MAX_STEP_BACK_SECONDS / stream.time_base)
    if any(earlier - later > step_back for earlier, later in itertools.pairwise(clock)):
        return False
    # AVI stores frames in coded order without a time. FFmpeg sees the order of display in MPEG-4's packets, but numbers
    # those of H.264 and its like just as they come.
    is_avi = "avi" in container.format.name.split(",")
    in_coded_order = all(later > earlier for earlier, later in itertools.pairwise(pts))  # type: ignore[operator]
    return not (is_avi and in_coded_order and stream.codec_context.has_b_frames)


def _running_times(scanned: Packets, stream: Any) -> np.ndarray:
    """Times for frames that are counted: the decoding clock, carried on by durations where it is silent or begins anew.

    Ascending: the frame shown next takes the next time, whichever packet that is of.
    """
    step_back = round(_MAX_STEP_BACK_SECONDS / stream.time_base)
    times: list[int] = []
    offset, latest = 0, None
    clocks = scanned.pts if all(time is None for time in scanned.dts) else scanned.dts
    for clock, duration in zip(clocks, [0, *scanned.durations], strict=False):
        following = times[-1] + (duration or 1) if times else 0
        if clock is None or abs(clock) > MAX_TIME:
            times.append(following)
            continue
        if latest is None or clock < latest - step_back or clock + offset > MAX_TIME:
            offset, latest = following - clock, clock
        latest = max(latest, clock)
        times.append(max(clock + offset, 0))
    return np.sort(np.asarray(times, np.int64))


def without_lead(index: PacketIndex, first_pts: int | None) -> PacketIndex:
    """The index without what a cut left over before the first key frame's picture and no frame came out of.

    These are packets coded before that key frame, and in HEVC also the pictures coded after it, shown before it, that refer
    to what was cut off.
    """
    if first_pts is None or not index.is_key.any():
        return index
    stays = index.display_times >= min(first_pts, int(index.times[np.argmax(index.is_key)]))
    return dataclasses.replace(index, display=index.display[stays], display_times=index.display_times[stays])


def without_lost_packets(index: PacketIndex, first_packets: Sequence[int]) -> PacketIndex:
    """The index of counted frames without those that a cut left over at the beginning and no frame comes out of.

    ``first_packets`` are coded indices of the packets that the first frames came from. What is missing before them was coded
    before the first key frame; what is missing right behind the first refers to that.
    """
    came = sorted(packet for packet in first_packets if packet is not None)
    if not came:
        return index
    stays = index.display >= came[0]
    if len(came) > 1:
        stays &= (index.display == came[0]) | (index.display >= came[1])
    return dataclasses.replace(index, display=index.display[stays], display_times=index.display_times[stays])


def timing(index: PacketIndex, stream: Any) -> tuple[np.ndarray, float, float]:
    """Timestamps in seconds, frames per second, duration in seconds.

    Where the times are those of a constant rate, up to the container's rounding, they are exactly ``index / fps``: what
    processors compute that know nothing but the rate. Where a frame was left out, they are not, however coarse the clock.
    """
    tick = float(stream.time_base)
    times = index.display_times
    seconds = (times - times[0]) * tick
    numbers = np.arange(len(seconds))
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and np.abs(seconds - numbers / float(rate)).max() <= min(tick * 1.001, 0.5 / float(rate)):
            return numbers / float(rate), float(rate), len(seconds) / float(rate)
    typical = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
    duration = float(seconds[-1]) + (index.last_duration * tick or typical or 1 / _FALLBACK_FPS)
    return seconds, len(seconds) / duration, duration


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Packets of the stream, from where the container stands, until the file ends or breaks.

    Where a stream appears midway, as in broadcasts, PyAV raises IndexError after the last packet: it ends every stream that
    the file has by then, and knows those it had at the beginning.
    """
    with contextlib.suppress(av.error.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet
