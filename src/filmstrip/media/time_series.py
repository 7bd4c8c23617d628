"""Time series files (arrays, tables of numbers, sounds) to float32 samples; knows no model and no prompt.

The format is told by content, never by name. Nothing a file says is believed before it is checked: limits hold before memory
is taken, no array is ever unpickled, and every value is finite.
"""

from __future__ import annotations

import csv
import itertools
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import soundfile

from filmstrip.errors import InvalidRequestError, MediaDecodeError, MediaTooLargeError
from filmstrip.media.sniff import sniff
from filmstrip.media.source import MediaSource
from filmstrip.types import TimeSeriesMetadata

MAX_SAMPLING_RATE = 1e9
_FORMATS_TEXT = "NumPy arrays (.npy), tables of numbers (.csv), WAV, MP3, FLAC and Ogg"
_BLOCK_VALUES = 1 << 18
_NUM_SNIFFED_BYTES = 4096

_NPY_MAGIC = b"\x93NUMPY"
_MAX_NPY_HEADER_BYTES = 10_000

_CSV_DELIMITERS = ("\t", ";", ",")
_MAX_CELL_CHARS = 64
_UTF8_MARK = "\ufeff"

_SOUND_FORMATS = {
    "WAV": "wav",
    "WAVEX": "wav",
    "RF64": "wav",
    "MP3": "mp3",
    "MPEG": "mp3",
    "FLAC": "flac",
    "OGG": "ogg",
}


def probe_time_series(
    source: MediaSource, *, max_values: int, max_channels: int, sampling_rate: float | None = None
) -> TimeSeriesMetadata:
    """Number of samples and channels, rate and format, without taking memory for the samples.

    ``sampling_rate`` (samples per second) is what the sender says and goes before what a sound file says. An array's header
    is read; a table's first line is checked and the others are counted; sounds whose headers do not tell their length
    exactly are decoded once, block by block.

    Raises InvalidRequestError for a ``sampling_rate`` that cannot be, MediaTooLargeError over ``max_values`` (samples times
    channels) or ``max_channels``, and MediaDecodeError for everything that is not a time series.
    """
    check_sampling_rate(sampling_rate)
    with source.open() as file:
        opened = _open(file, source, _Limits(max_values, max_channels))
        rate = opened.sampling_rate if sampling_rate is None else float(sampling_rate)
        return TimeSeriesMetadata(opened.num_samples, opened.num_channels, rate, opened.format)


def read_time_series(
    source: MediaSource, *, max_values: int, max_channels: int, out: np.ndarray | None = None
) -> np.ndarray:
    """All samples as float32 (num_samples, num_channels), a channel a column.

    Integers of a sound are scaled to [-1, 1), all other values are as they stand in the file; True is 1. ``out`` takes the
    samples instead of new memory: C-contiguous float32 of the shape that :func:`probe_time_series` gave; it may be changed
    though an error is raised.

    Raises as :func:`probe_time_series`, and MediaDecodeError for values that are no finite float32, naming the first, for
    table cells that are no numbers, naming row and column, and for a file that ends early.
    """
    with source.open() as file:
        opened = _open(file, source, _Limits(max_values, max_channels))
        shape = (opened.num_samples, opened.num_channels)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise MediaDecodeError(f"the time series has the shape {shape}, not {out.shape} as float32")
        opened.read(out)
    return out


def time_series_from_data(data: Any, *, max_values: int, max_channels: int) -> np.ndarray:
    """Samples given as an object, as :func:`read_time_series` would give them: a new float32 array.

    ``data`` is an array of booleans, integers or floats, (num_samples, num_channels) or (num_samples,). Raises
    MediaDecodeError for anything else and for values that are no finite float32, MediaTooLargeError over the limits.
    """
    if not isinstance(data, np.ndarray):
        raise MediaDecodeError(f"a time series object must be a numpy array, not {type(data).__name__}")
    _check_dtype(data.dtype)
    num_samples, num_channels = _Limits(max_values, max_channels).check_shape(data.shape)
    out = np.empty((num_samples, num_channels), np.float32)
    _put(out, data.reshape(num_samples, num_channels), 0)
    return out


def check_sampling_rate(sampling_rate: object, param: str = "sampling_rate") -> None:
    """Raise InvalidRequestError naming ``param`` unless it is None or a number in (0, 1e9] (samples per second)."""
    if sampling_rate is None:
        return
    is_number = isinstance(sampling_rate, numbers.Real) and not isinstance(sampling_rate, bool)
    if not is_number or not 0 < sampling_rate <= MAX_SAMPLING_RATE:  # type: ignore[operator]
        raise InvalidRequestError(
            f"{param} must be a number > 0 and at most {MAX_SAMPLING_RATE:g} (samples per second), "
            f"not {sampling_rate!r:.80}",
            param=param,
        )


@dataclass(frozen=True)
class _Limits:
    max_values: int
    max_channels: int

    def check_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(num_samples, num_channels) of an array's shape."""
        if len(shape) not in (1, 2):
            raise MediaDecodeError(
                f"the array has {len(shape)} axes; a time series has one (samples) or two (samples, channels)"
            )
        num_samples, num_channels = shape if len(shape) == 2 else (shape[0], 1)
        self.check(num_samples, num_channels)
        return num_samples, num_channels

    def check(self, num_samples: int, num_channels: int) -> None:
        """Raise unless there is something and it is within the limits."""
        if num_samples < 1 or num_channels < 1:
            raise MediaDecodeError(f"the time series is empty: {num_samples} samples of {num_channels} channels")
        self.check_channels(num_channels)
        if num_samples * num_channels > self.max_values:
            raise MediaTooLargeError(
                f"the time series has {num_samples} samples x {num_channels} channels; the limit is {self.max_values} "
                "values (max_time_series_values, --max-time-series-values)"
            )

    def check_channels(self, num_channels: int) -> None:
        """Raise if there are too many."""
        if num_channels > self.max_channels:
            raise MediaTooLargeError(
                f"the time series has {num_channels} channels; the limit is {self.max_channels}"
                " (max_time_series_channels, --max-time-series-channels)"
            )


@dataclass(frozen=True)
class _Opened:
    """A file whose header was checked. ``read`` fills float32 (num_samples, num_channels)."""

    num_samples: int
    num_channels: int
    format: str
    read: Callable[[np.ndarray], None]
    sampling_rate: float | None = None


def _open(file: BinaryIO, source: MediaSource, limits: _Limits) -> _Opened:
    head = file.read(_NUM_SNIFFED_BYTES)
    file.seek(0)
    if head.startswith(_NPY_MAGIC):
        return _open_npy(file, source.num_bytes, limits)
    if _is_sound(head):
        return _open_sound(file, limits)
    _check_is_table(head, source)
    return _open_csv(file, limits)


def _is_sound(head: bytes) -> bool:
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return True
    # An MPEG audio frame begins with eleven ones, a version that is not 01 and a layer: 10 is II, 01 is III.
    is_frame = head[:1] == b"\xff" and head[1:2] != b"" and head[1] & 0xE0 == 0xE0 and head[1] & 0x18 != 8
    return (is_frame and head[1] & 6 in (2, 4)) or head.startswith((b"fLaC", b"OggS", b"ID3"))


def _check_is_table(head: bytes, source: MediaSource) -> None:
    """Raise unless the file may be a table: everything with a signature is something else."""
    kind = sniff(source)
    if kind.kind in ("image", "video"):
        raise MediaDecodeError(f"this is {kind}, not a time series; send it as {kind.kind}_url")
    is_text = kind.kind == "unknown" or kind.format.startswith("text")
    # No encoding but UTF-16 and UTF-32 has zeros in a table.
    if not is_text or not head or b"\0" in head or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        what = f"this is {kind}" if not is_text else "the bytes are not a time series"
        raise MediaDecodeError(f"{what}; supported are {_FORMATS_TEXT}, tables as UTF-8 text")


# Values


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise MediaDecodeError(
            f"the array holds values of type {dtype!s:.80}; a time series takes booleans, integers and floats of up to "
            "64 bits"
        )


def _put(target: np.ndarray, values: np.ndarray, first_sample: int, first_channel: int = 0) -> None:
    """Write ``values`` to ``target`` (samples, channels), both of the same shape; raises for what is no finite float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        target[...] = values
    if np.isfinite(target).all():
        return
    sample, channel = np.argwhere(~np.isfinite(target))[0].tolist()
    reason = "is beyond the range of float32" if np.isfinite(values[sample, channel]) else "is not finite"
    raise MediaDecodeError(
        f"the value at sample {first_sample + sample}, channel {first_channel + channel} (both counted from 0) {reason}"
    )


# NumPy arrays


def _open_npy(file: BinaryIO, num_bytes: int, limits: _Limits) -> _Opened:
    """The format is https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html."""
    shape, is_by_column, dtype = _npy_header(file)
    start = file.tell()
    _check_dtype(dtype)
    num_samples, num_channels = limits.check_shape(shape)
    missing = start + num_samples * num_channels * dtype.itemsize - num_bytes
    if missing > 0:
        raise _broken_npy(f"its shape is {shape}, but {missing} bytes of its values are missing")
    if missing < 0:
        raise _broken_npy(f"{-missing} bytes follow its values (only one array may be in a file)")

    def read(out: np.ndarray) -> None:
        file.seek(start)
        if is_by_column:
            for channel in range(num_channels):
                _read_npy_rows(file, dtype, out[:, channel : channel + 1], channel)
        else:
            _read_npy_rows(file, dtype, out, 0)

    return _Opened(num_samples, num_channels, "npy", read)


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns follow each other, and type; the file stands at the values."""
    version = file.read(len(_NPY_MAGIC) + 2)[len(_NPY_MAGIC) :]
    read = {b"\1\0": np.lib.format.read_array_header_1_0, b"\2\0": np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise _broken_npy(f"its version is {'.'.join(map(str, version))}; supported are 1.0 and 2.0")
    try:
        return read(file, max_header_size=_MAX_NPY_HEADER_BYTES)
    # A header is a Python literal, parsed and never run; of one that is none, the parser and tokenizer say what they like.
    except Exception:
        raise _broken_npy("its header is not understood") from None


def _read_npy_rows(file: BinaryIO, dtype: np.dtype, out: np.ndarray, first_channel: int) -> None:
    num_samples, num_channels = out.shape
    rows = max(1, _BLOCK_VALUES // num_channels)
    for start in range(0, num_samples, rows):
        target = out[start : start + rows]
        data = file.read(target.size * dtype.itemsize)
        if len(data) < target.size * dtype.itemsize:
            raise _broken_npy("it ends early")
        # A boolean's byte may be anything but 0 for True.
        values = np.frombuffer(data, np.uint8) != 0 if dtype.kind == "b" else np.frombuffer(data, dtype)
        _put(target, values.reshape(target.shape), start, first_channel)


def _broken_npy(what: str) -> MediaDecodeError:
    return MediaDecodeError(f"the NumPy array cannot be read: {what}")


# Tables


def _open_csv(file: BinaryIO, limits: _Limits) -> _Opened:
    names, delimiter = _first_cells(file, limits)
    num_columns, has_names = len(names), not any(map(_is_float, names))
    num_rows = sum(1 for _ in _rows(file, limits)) - has_names
    if has_names and num_rows == 0:
        raise MediaDecodeError("the table has names of columns and no numbers")
    limits.check(num_rows, num_columns)

    def read(out: np.ndarray) -> None:
        rows = itertools.islice(_rows(file, limits), int(has_names), None)
        done, block_rows = 0, max(1, _BLOCK_VALUES // num_columns)
        while block := list(itertools.islice(rows, block_rows)):
            _put_rows(out[done : done + len(block)], block, delimiter)
            done += len(block)

    return _Opened(num_rows, num_columns, "csv", read)


def _first_cells(file: BinaryIO, limits: _Limits) -> tuple[list[str], str]:
    """Cells of the first row that is not empty, and what stands between them."""
    number, line = next(_rows(file, limits), (1, ""))
    delimiter = next((each for each in _CSV_DELIMITERS if each in line), ",")
    limits.check_channels(line.count(delimiter) + 1)
    try:
        cells = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        cells = []
    if not any(cell.strip() for cell in cells):
        raise MediaDecodeError(f"row {number} of the table has neither numbers nor names of columns")
    return cells, delimiter


def _rows(file: BinaryIO, limits: _Limits) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, from the beginning, with their numbers (from 1)."""
    max_bytes = (limits.max_channels + 1) * (_MAX_CELL_CHARS + 1)
    file.seek(0)
    for number in itertools.count(1):
        line = file.readline(max_bytes + 1)
        if not line:
            return
        if len(line) > max_bytes:
            raise MediaTooLargeError(
                f"row {number} of the table has more than {max_bytes} bytes; a row may have {limits.max_channels} columns "
                f"(max_time_series_channels, --max-time-series-channels) of {_MAX_CELL_CHARS} characters"
            )
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise MediaDecodeError(f"row {number} of the table is not UTF-8 text") from None
        text = text.removeprefix(_UTF8_MARK) if number == 1 else text
        if text.strip():
            yield number, text


def _put_rows(target: np.ndarray, rows: list[tuple[int, str]], delimiter: str) -> None:
    """Write the numbers of ``rows`` to ``target``; raises for the first cell that is none."""
    values = None
    try:
        values = np.loadtxt([text for _, text in rows], delimiter=delimiter, comments=None, quotechar='"', ndmin=2)
        target[...] = _as_float32(values)
    except ValueError:  # a cell that is no number, or more or fewer cells than in the first row
        pass
    else:
        if np.isfinite(target).all():
            return
    raise _wrong_cell(rows, delimiter, target.shape[1])


def _wrong_cell(rows: list[tuple[int, str]], delimiter: str, num_columns: int) -> MediaDecodeError:
    """The error for the first cell that is not as it must be; never with its text, which may be of another file's."""
    for number, text in rows:
        try:
            cells = next(csv.reader([text], delimiter=delimiter))
        except csv.Error:
            return MediaDecodeError(f"row {number} of the table cannot be read")
        if len(cells) != num_columns:
            return MediaDecodeError(f"row {number} of the table has {len(cells)} columns, not {num_columns} as row 1")
        for column, cell in enumerate(cells, 1):
            where = f"row {number}, column {column} of the table"
            if not cell.strip():
                return MediaDecodeError(f"{where} is empty")
            if not _is_float(cell):
                return MediaDecodeError(f"{where} is not a number")
            if not math.isfinite(float(cell)):
                return MediaDecodeError(f"{where} is not finite")
            if not np.isfinite(_as_float32(np.float64(cell))):
                return MediaDecodeError(f"{where} is beyond the range of float32")
    return MediaDecodeError("the table has a cell that is not a number")


def _as_float32(values: Any) -> Any:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # which only Python reads over


# Sounds


class _Sound(soundfile.SoundFile):
    """A sound that is read from its beginning to its end.

    soundfile seeks after every read of a file that can seek, which fails at the end of a FLAC of unknown length and is not
    exact in an MP3.
    """

    def seekable(self) -> bool:
        return False


def _open_sound(file: BinaryIO, limits: _Limits) -> _Opened:
    with _sound(file) as sound:
        format = _SOUND_FORMATS.get(sound.format)
        if format is None:
            raise MediaDecodeError(f"the sound is of the format {sound.format:.40}; supported are {_FORMATS_TEXT}")
        rate, num_channels, num_samples = float(sound.samplerate), sound.channels, sound.frames
        if not 0 < rate <= MAX_SAMPLING_RATE:
            raise MediaDecodeError(
                f"the sound's rate is {rate:g} samples per second; at most {MAX_SAMPLING_RATE:g} can be"
            )
        limits.check(1, num_channels)
        if format != "wav":  # only here does the length follow from the size of the file
            num_samples = _count_samples(sound, limits)
    limits.check(num_samples, num_channels)

    def read(out: np.ndarray) -> None:
        rows = max(1, _BLOCK_VALUES // num_channels)
        with _sound(file) as again:
            for start in range(0, num_samples, rows):
                target = out[start : start + rows]
                block = _read_block(again, len(target))
                if len(block) < len(target):
                    raise MediaDecodeError("the sound ends early")
                _put(target, block, start)

    return _Opened(num_samples, num_channels, format, read, rate)


def _sound(file: BinaryIO) -> _Sound:
    file.seek(0)
    try:
        return _Sound(file)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise _broken_sound(error) from None


def _count_samples(sound: _Sound, limits: _Limits) -> int:
    """Decode once, keeping nothing."""
    num_samples = 0
    while block := len(_read_block(sound, max(1, _BLOCK_VALUES // sound.channels))):
        num_samples += block
        limits.check(num_samples, sound.channels)
    return num_samples


def _read_block(sound: _Sound, num_samples: int) -> np.ndarray:
    try:
        return sound.read(num_samples, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError) as error:
        raise _broken_sound(error) from None


def _broken_sound(error: Exception) -> MediaDecodeError:
    reason = getattr(error, "error_string", "") or "it is damaged"
    return MediaDecodeError(f"the sound cannot be read: {str(reason)[:200]}")
