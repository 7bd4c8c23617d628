"""Time series files: samples as they were written, limits before memory, and errors that say where the fault is."""

import io
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from filmstrip.errors import InvalidRequestError, MediaDecodeError, MediaTooLargeError
from filmstrip.media.source import BytesSource
from filmstrip.media.time_series import probe_time_series, read_time_series, time_series_from_data

LIMITS = {"max_values": 2_000_000, "max_channels": 8}


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def probe(data, **settings):
    return probe_time_series(BytesSource(data), **{**LIMITS, **settings})


def read(data, **settings):
    return read_time_series(BytesSource(data), **{**LIMITS, **settings})


def sound(samples, rate, format, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **options)
    return file.getvalue()


def tone(num_samples, num_channels=1, rate=8000):
    times = np.arange(num_samples) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * (440 + 110 * c) * times) for c in range(num_channels)], axis=1)


# Arrays


@given(
    arrays.arrays(
        st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<f2", "|i1", "|u1", "<i2", ">i4", "<i8", "<u8", "|b1"]),
        arrays.array_shapes(min_dims=1, max_dims=2, max_side=8),
    ),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0)]),
)
def test_arrays_come_as_numpy_reads_them(array, by_column, version):
    with np.errstate(over="ignore", invalid="ignore"):
        expected = array.reshape(len(array), -1).astype(np.float32)
    data = npy(np.asfortranarray(array) if by_column else array, version=version)
    if np.isfinite(expected).all():
        np.testing.assert_array_equal(read(data), expected)
        metadata = probe(data)
        assert (metadata.num_samples, metadata.num_channels) == expected.shape
        assert (metadata.sampling_rate, metadata.format) == (None, "npy")
    else:
        with pytest.raises(MediaDecodeError, match=r"at sample \d+, channel \d+"):
            read(data)


def test_arrays_larger_than_a_block_come_whole_in_both_orders():
    array = np.random.default_rng(0).normal(size=(150_000, 3)).astype(np.float32)
    np.testing.assert_array_equal(read(npy(array)), array)
    np.testing.assert_array_equal(read(npy(np.asfortranarray(array))), array)


def test_samples_go_where_the_caller_wants_them():
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    out = np.zeros((3, 2), np.float32)
    assert read(npy(array), out=out) is out
    np.testing.assert_array_equal(out, array)
    with pytest.raises(MediaDecodeError, match=r"shape \(3, 2\)"):
        read(npy(array), out=np.zeros((2, 2), np.float32))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(np.ones((2, 2, 2))), "3 axes"),
        (npy(np.float32(1)), "0 axes"),
        (npy(np.array(["a"])), "values of type <U1"),
        (npy(np.ones(2, np.complex64)), "complex64"),
        (npy(np.ones(2, np.longdouble)), "float128"),
        (npy(np.ones(2, "datetime64[s]")), "datetime64"),
        (npy(np.ones(0)), "empty"),
        (npy(np.ones(4))[:-1], "1 bytes of its values are missing"),
        (npy(np.ones(4)) + b"x", "1 bytes follow"),
        (npy(np.ones(4)).replace(b"\x01\x00v", b"\x07\x00v"), "version is 7.0"),
        (npy(np.ones(4))[:30], "header is not understood"),
        (npy(np.array([1.0, np.nan])), "at sample 1, channel 0 .* is not finite"),
        (npy(np.array([[1.0, 1e39]])), "at sample 0, channel 1 .* is beyond the range of float32"),
    ],
)
def test_wrong_arrays_are_refused_with_the_reason(data, words):
    with pytest.raises(MediaDecodeError, match=words):
        read(data)


def test_an_array_of_objects_is_never_unpickled():
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    with pytest.raises(MediaDecodeError, match="values of type object"):
        read(npy(np.array([Bomb()], dtype=object), allow_pickle=True))


# Tables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("left,right\n1,2\n3,4", [[1, 2], [3, 4]]),
        ('"left, loud",right\n1,2\n', [[1, 2]]),
        ('"1","2"\n', [[1, 2]]),
        ("1\t2\r\n-3.5e2\t+4\r\n", [[1, 2], [-350, 4]]),
        ("1;2\n3;4\n", [[1, 2], [3, 4]]),
        ("\ufeff1, 2\n\n 3 ,4\n\n\n", [[1, 2], [3, 4]]),
        ("5\n6\n7\n", [[5], [6], [7]]),
        ("t,x\n0.1,2\n0.2,3\n", [[0.1, 2], [0.2, 3]]),
    ],
)
def test_tables(text, expected):
    expected = np.array(expected, np.float32)
    np.testing.assert_array_equal(read(text.encode()), expected)
    metadata = probe(text.encode())
    assert (metadata.num_samples, metadata.num_channels, metadata.format) == (*expected.shape, "csv")


def test_a_long_table_comes_whole():
    values = np.random.default_rng(1).normal(size=(200_000, 2)).astype(np.float32)
    text = "\n".join(f"{a!r},{b!r}" for a, b in values.tolist())
    np.testing.assert_array_equal(read(text.encode()), values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2\n3,x\n", "row 2, column 2 of the table is not a number"),
        ("a,b\n1,2\n\n3,\n", "row 4, column 2 of the table is empty"),
        ("1,2\n3\n", "row 2 of the table has 1 columns, not 2"),
        ("1,2\n3,4,5\n", "row 2 of the table has 3 columns, not 2"),
        ("1,nan\n", "row 1, column 2 of the table is not finite"),
        ("1,2\ninf,2\n", "row 2, column 1 of the table is not finite"),
        ("1,2\n1,1e39\n", "row 2, column 2 of the table is beyond the range of float32"),
        ("1,2\n1_0,2\n", "row 2, column 1 of the table is not a number"),
        ("a,b\n", "the table has names of columns and no numbers"),
        ("=cmd|' /C calc'!A0,1\n2,3\n", "row 1, column 1 of the table is not a number"),
        (",\n1,2\n", "row 1 of the table has neither numbers nor names"),
        ("caf\xe9\n1\n", "row 1 of the table is not UTF-8"),
    ],
)
def test_wrong_tables_are_refused_with_row_and_column(text, words):
    with pytest.raises(MediaDecodeError) as caught:
        read(text.encode("latin-1"))
    assert words in caught.value.message


# Sounds


@pytest.mark.parametrize(
    ("format", "subtype", "exact"),
    [
        ("WAV", "PCM_16", True),
        ("WAV", "PCM_24", True),
        ("WAV", "FLOAT", True),
        ("FLAC", "PCM_16", True),
        ("OGG", "VORBIS", False),
        ("MP3", "MPEG_LAYER_III", False),
    ],
)
def test_sounds(format, subtype, exact):
    samples = tone(20_000, 2)
    data = sound(samples, 8000, format, subtype=subtype)
    metadata = probe(data)
    assert (metadata.num_channels, metadata.sampling_rate, metadata.format) == (2, 8000, format.lower())
    assert metadata.duration == metadata.num_samples / 8000
    got = read(data)
    assert got.dtype == np.float32
    assert got.shape == (metadata.num_samples, 2)
    if exact:
        np.testing.assert_array_equal(got, soundfile.read(io.BytesIO(data), dtype="float32")[0])
        np.testing.assert_allclose(got, samples, atol=2**-15)
    else:
        assert abs(len(got) - 20_000) < 2 * 1152  # encoders pad; two frames of MP3 at most
        assert np.abs(got[: len(samples)]).max() == pytest.approx(0.5, abs=0.1)


def test_integers_of_a_sound_are_scaled():
    data = sound(np.array([[-32768], [0], [16384], [32767]], np.int16), 8000, "WAV")
    np.testing.assert_array_equal(read(data)[:, 0], np.array([-1, 0, 0.5, 32767 / 32768], np.float32))


@pytest.mark.parametrize("codec", [["-f", "wav"], ["-f", "flac"], ["-f", "mp3"], ["-f", "ogg", "-c:a", "libvorbis"]])
def test_sounds_written_to_a_pipe_do_not_know_their_length(codec):
    """What ffmpeg cannot go back to fill in is counted."""
    command = [shutil.which("ffmpeg"), "-v", "error", "-f", "lavfi", "-i", "sine=r=8000:d=1.5", *codec, "pipe:1"]
    data = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    metadata = probe(data)
    got = read(data)
    assert got.shape == (metadata.num_samples, 1)
    assert abs(len(got) - 12_000) <= 2 * 1152
    assert metadata.sampling_rate == 8000


def test_an_mp3_with_variable_rate_and_tags_is_read_to_its_end(tmp_path):
    path = tmp_path / "long.mp3"
    source = "sine=r=44100:d=20,volume='if(lt(mod(t,4),2),1,0.001)':eval=frame"
    command = [shutil.which("ffmpeg"), "-v", "error", "-f", "lavfi", "-i", source, "-q:a", "5", str(path)]
    subprocess.run([*command[:-1], "-metadata", "title=x", command[-1]], check=True, timeout=60)
    got = read(path.read_bytes())
    assert abs(len(got) - 20 * 44100) <= 3 * 1152
    assert np.abs(got[-80_000:-4000]).max() < 0.01  # quiet from second 18 on, loud before
    assert np.abs(got[16 * 44100 + 4000 : 18 * 44100 - 4000]).max() > 0.05


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sound(tone(100), 8000, "WAV")[:20], "sound cannot be read"),
        (sound(tone(0), 8000, "WAV"), "empty"),
        (sound(tone(5000), 8000, "FLAC")[:60], "sound cannot be read|empty"),
        (b"ID3" + bytes(100), "sound cannot be read|empty"),
    ],
)
def test_wrong_sounds_are_refused(data, words):
    with pytest.raises(MediaDecodeError, match=words):
        read(data)


def test_a_flac_that_is_cut_off_gives_what_is_there_or_an_error():
    data = sound(np.random.default_rng(0).normal(size=50_000) * 0.1, 8000, "FLAC")
    cut = data[: len(data) // 2]
    try:
        num_samples = probe(cut).num_samples
    except MediaDecodeError:
        return
    assert len(read(cut)) == num_samples < 50_000


# Limits and other files


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (npy(np.ones((10, 9))), {}, r"9 channels; the limit is 8 .*--max-time-series-channels"),
        (
            npy(np.ones(101)),
            {"max_values": 100},
            r"101 samples x 1 channels; the limit is 100 values .*--max-time-series",
        ),
        (b"1,2,3,4,5,6,7,8,9\n", {}, "9 channels; the limit is 8"),
        (b"1\n" * 101, {"max_values": 100}, "101 samples x 1 channels"),
        (b"1" * 1000 + b"\n", {}, "row 1 of the table has more than 585 bytes"),
        (sound(tone(101), 8000, "WAV"), {"max_values": 100}, "101 samples x 1 channels"),
        (sound(tone(50_000), 8000, "FLAC"), {"max_values": 100}, "samples x 1 channels"),
        (sound(tone(100, 9), 8000, "WAV"), {}, "9 channels"),
    ],
)
def test_limits_name_themselves(data, settings, words):
    with pytest.raises(MediaTooLargeError, match=words):
        probe(data, **settings)


def test_a_header_that_promises_much_takes_no_memory():
    data = bytearray(npy(np.ones(4)))
    data = bytes(data).replace(b"(4,), }          ", b"(1900000, 1), }  ")
    with pytest.raises(MediaDecodeError, match="15199968 bytes of its values are missing"):
        probe(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image, not a time series; send it as image_url"),
        (b"\0\0\0\x18ftypmp42" + bytes(50), "an MP4 video, not a time series; send it as video_url"),
        (b"PK\x03\x04" + bytes(50), "a ZIP archive"),
        (b"\x80\x04\x95" + bytes(50), "not a time series"),
        ("1,2\n".encode("utf-16"), "not a time series"),
    ],
)
def test_other_files_are_named(data, words):
    with pytest.raises(MediaDecodeError, match=words):
        probe(data)


def test_the_sender_knows_the_rate_better():
    assert probe(npy(np.ones(4)), sampling_rate=100).duration == 0.04
    assert probe(sound(tone(100), 8000, "WAV"), sampling_rate=16000).sampling_rate == 16000.0


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 1e10, True, "8000"])
def test_a_rate_that_cannot_be_is_refused(rate):
    with pytest.raises(InvalidRequestError, match="sampling_rate must be a number"):
        probe(npy(np.ones(4)), sampling_rate=rate)


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"ID3"])
)
def test_any_bytes_are_read_or_refused(data, magic):
    try:
        got = read(magic + data)
    except InvalidRequestError:
        return
    assert got.shape == (probe(magic + data).num_samples, probe(magic + data).num_channels)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("data", [[1.0], np.array("x"), np.ones((1, 1, 1)), np.array([np.inf])])
def test_objects_that_are_no_series_are_refused(data):
    with pytest.raises(MediaDecodeError):
        time_series_from_data(data, **LIMITS)
    np.testing.assert_array_equal(time_series_from_data(np.array([True, False]), **LIMITS), [[1], [0]])
