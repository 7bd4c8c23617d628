"""Attack cases A45 and A46: arrays, tables and sounds that are bombs, carry code, or lie about their size."""

import asyncio
import base64
import io
import os
import pickle
import resource
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import FilmstripError, InvalidRequestError
from filmstrip.media.loader import MediaLoader
from filmstrip.types import MediaItem, Modality
from tests.attacks.forge import npy, npy_of, wav
from tests.attacks.harness import AttackedServer, Case, attacks, data_url, question
from tests.models.interns1_pro import make_interns1_pro

MARK = Path(tempfile.gettempdir()) / f"attack-code-ran-{os.getpid()}"


class Payload:
    """Makes the folder ``MARK`` when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (str(MARK),))


def header(descr="<f4", shape="(256,)", order="False"):
    return f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()


def zip_bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(header(shape="(50000000,)"), bytes(200_000_000)))
    return file.getvalue()


def wide_table(num_columns=10**6):
    return (",".join(["1"] * num_columns) + "\n").encode()


HOSTILE = {
    "A46-pickled-object": npy_of(np.array([Payload()], dtype=object), allow_pickle=True),
    "A46-bare-pickle": pickle.dumps(Payload()),
    "A46-object-type": npy(header("|O", "(3,)")),
    "A46-text-type": npy_of(np.array(["a", "b"])),
    "A46-bytes-type": npy_of(np.array([b"a", b"b"])),
    "A46-complex-type": npy_of(np.ones(4, np.complex64)),
    "A46-record-type": npy_of(np.ones(4, [("a", "<f4"), ("b", "<f4")])),
    "A46-time-type": npy_of(np.array(["2020-01-01"], "datetime64[s]")),
    "A46-trillion-samples": npy(header(shape="(1099511627776,)")),
    "A46-overflowing-shape": npy(header(shape="(65536, 65536, 65536, 65536)")),
    "A46-negative-shape": npy(header(shape="(-1,)")),
    "A46-negative-shapes": npy(header(shape="(-2, -128)")),
    "A46-no-samples": npy_of(np.ones((0,), np.float32)),
    "A46-no-channels": npy_of(np.ones((5, 0), np.float32)),
    "A46-no-shape": npy_of(np.float32(1.0)),
    "A46-three-axes": npy_of(np.ones((2, 2, 2), np.float32)),
    "A46-many-channels": npy_of(np.ones((2, 5000), np.float32)),
    "A46-cut": npy(header(shape="(256,)"), bytes(100)),
    "A46-header-of-4-gigabytes": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr'",
    "A46-header-with-code": npy(f"__import__('os').mkdir({str(MARK)!r})".encode()),
    "A46-deep-header": npy(b"(" * 20_000),
    "A46-nan": npy_of(np.array([1.0, np.nan])),
    "A46-inf": npy_of(np.array([1.0, np.inf])),
    "A46-zip-bomb": zip_bomb(),
    "A46-million-columns": wide_table(),
    "A46-formula": b"=cmd|' /C calc'!A0,1\n2,3\n",
    "A46-ragged": b"1,2\n3\n",
    "A46-long-field": b"1" * 1_000_000 + b",2\n",
    "A46-csv-nan": b"1,nan\n2,3\n",
    "A46-csv-inf": b"1,1e999\n2,3\n",
    "A46-csv-nul": b"1,2\n3,\x004\n",
    "A45-rate-2-billion": wav(rate=2**31),
    "A45-rate-0": wav(rate=0),
    "A45-no-channels": wav(channels=0),
    "A45-65535-channels": wav(channels=65535),
    "A45-4-gigabytes": wav(data_size=2**32 - 1, samples=b""),
    "A45-no-samples": wav(samples=b""),
    "A45-cut-header": wav()[:30],
    "A45-cut-mp3": b"\xff\xfb\x90\x00" + bytes(30),
    "A45-id3-only": b"ID3\x04\0\0\0\0\x0f\x7f" + bytes(2000),
    "A45-flac-of-nothing": b"fLaC\x80\0\0\x22" + b"\xff" * 34,
}


@attacks(Case(name, modalities=("time_series_url", "video_url")) for name in HOSTILE)
def test_the_server_refuses_them_whatever_they_are_sent_as(server, case, kind, stream):
    server.check_refused(case, kind, stream, url=data_url(HOSTILE[case.name], "application/octet-stream"))
    assert not MARK.exists()


@pytest.fixture(scope="module")
def series_server(clip, tmp_path_factory):
    """A server whose model takes time series."""
    model = make_interns1_pro(tmp_path_factory.mktemp("interns1_pro"))
    with AttackedServer(model, None, clip, tmp_path_factory.mktemp("attack-tls")) as server:
        yield server


@pytest.mark.parametrize("name", HOSTILE)
def test_a_server_with_such_a_model_refuses_them(series_server, name):
    url = data_url(HOSTILE[name], "application/octet-stream")
    error = series_server.check_refused(Case(name), "time_series_url", len(name) % 2 == 0, url=url)
    assert "takes no" not in error["message"]
    assert not MARK.exists()


@pytest.mark.parametrize("rate", [0, -1, 1e300, float("nan"), float("inf"), True, "8000", [8000], {}])
def test_impossible_rates_in_a_request(series_server, rate):
    case = Case("A46-sampling-rate", part={"sampling_rate": rate}, param="messages[0].content[0].time_series_url")
    error = series_server.check_refused(
        case, "time_series_url", False, url=data_url(GOOD["npy"], "application/octet-stream")
    )
    assert "sampling_rate" in error["param"]


def test_a_server_with_such_a_model_answers_good_ones(series_server):
    for data in GOOD.values():
        answer = series_server.post(question(data_url(data, "application/octet-stream"), "time_series_url"))
        assert answer.status_code == 200, answer.text


GOOD = {
    "npy": npy_of(np.arange(200, dtype=np.float32).reshape(100, 2)),
    "npy-big-endian": npy_of(np.arange(200, dtype=">f8").reshape(100, 2)),
    "csv": b"left,right\n" + b"1,2\n3,4\n" * 50,
    "wav": wav(),
}


async def open_series(loader, data, **settings):
    """Metadata of a series that can be read, or the error."""
    url = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
    try:
        opened = await loader.open(await loader.fetch(MediaItem(Modality.TIME_SERIES, url=url, **settings)))
        try:
            samples = await loader.read_samples(opened)
        finally:
            opened.close()
    except FilmstripError as error:
        return error
    assert samples.shape == (opened.metadata.num_samples, opened.metadata.num_channels)
    assert np.isfinite(samples.array).all()
    return opened.metadata


@pytest.fixture(scope="module")
def results():
    """What the loader says to every file, good and hostile, and how much memory this process took for them."""

    async def open_all():
        loader = MediaLoader(MediaConfig(num_decode_threads=2))
        try:
            good = {name: await open_series(loader, data) for name, data in GOOD.items()}
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            hostile = {name: await open_series(loader, data) for name, data in HOSTILE.items()}
            rates = [await open_series(loader, GOOD["npy"], sampling_rate=rate) for rate in (0.0, -1.0, np.nan, np.inf)]
            growth_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            return good, hostile, rates, growth_kib
        finally:
            await loader.close()

    return asyncio.run(open_all())


@pytest.mark.parametrize("name", HOSTILE)
def test_the_loader_refuses_them(results, name):
    assert isinstance(results[1][name], InvalidRequestError), results[1][name]
    assert not MARK.exists()


def test_the_mark_would_be_made():
    pickle.loads(HOSTILE["A46-bare-pickle"])
    assert MARK.exists()
    MARK.rmdir()


def test_no_memory_is_taken_on_the_word_of_a_header(results):
    assert results[3] < 300 * 1024


def test_impossible_rates_are_refused(results):
    assert all(isinstance(result, InvalidRequestError) for result in results[2])


@pytest.mark.parametrize("name", GOOD)
def test_good_series_are_opened(results, name):
    """What all refusals above are worth nothing without."""
    assert results[0][name].num_samples == {"csv": 100, "wav": 800}.get(name, 100)
