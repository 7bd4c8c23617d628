"""Sources: shared readers, spooling, and hashes of files that change."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from filmstrip.media import source as source_module
from filmstrip.media.source import BytesSource, FileSource, SpanSource, SpooledBytes, pack

DATA = os.urandom(200_000)


def file_source(path, **options):
    return FileSource(os.open(path, os.O_RDONLY), **options)


@pytest.fixture
def path(tmp_path):
    """A file of :data:`DATA`."""
    path = tmp_path / "clip"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def hashed(monkeypatch):
    """Counts the bytes that are hashed; every file counts as settled, however young."""
    monkeypatch.setattr(source_module, "_FILE_HASHES", source_module._FileHashes())
    monkeypatch.setattr(source_module, "_SETTLED_SECONDS", -1.0)
    counter = []

    class Digest:
        def __init__(self, data=b""):
            self._digest = hashlib.new("sha256", data)
            self.digest, self.hexdigest = self._digest.digest, self._digest.hexdigest

        def update(self, chunk):
            counter.append(len(chunk))
            self._digest.update(chunk)

    monkeypatch.setattr(source_module.hashlib, "sha256", Digest)
    return counter


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_readers_are_independent(path, kind):
    source = BytesSource(DATA) if kind == "bytes" else file_source(path)
    assert (source.num_bytes, source.content_hash) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    first, second = source.open(), source.open()
    first.seek(1000)
    assert second.read(10) == DATA[:10]
    assert first.read(10) == DATA[1000:1010]
    first.seek(-5, os.SEEK_END)
    assert first.read() == DATA[-5:]
    assert first.seek(10, os.SEEK_CUR) == len(DATA) + 10
    assert first.read() == b""


def test_readers_keep_the_file_open(path):
    reader = file_source(path).open()
    path.unlink()
    assert reader.read() == DATA


def test_a_file_that_grows_shows_only_what_was_hashed(path):
    source = file_source(path)
    with open(path, "ab") as file:
        file.write(b"more")
    assert source.open().read() == DATA


def test_threads_can_read_one_source_at_once(path):
    source, wrong = file_source(path), []

    def read(start):
        with source.open() as file:
            for position in range(start, len(DATA), 997):
                file.seek(position)
                if file.read(50) != DATA[position : position + 50]:
                    wrong.append(position)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_known_file_is_not_read_again(path, hashed):
    content_hash = file_source(path).content_hash
    assert sum(hashed) == len(DATA)
    assert file_source(path).content_hash == content_hash
    assert sum(hashed) == len(DATA)


@pytest.mark.parametrize("change", ["content", "append", "replace"])
def test_a_changed_file_is_read_again(path, hashed, change):
    before = file_source(path).content_hash
    if change == "content":
        times = path.stat()
        time.sleep(0.02)
        path.write_bytes(DATA[::-1])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a time stamp that was set back
    elif change == "append":
        with open(path, "ab") as file:
            file.write(b"x")
    else:
        (path.parent / "other").write_bytes(DATA[::-1])
        os.replace(path.parent / "other", path)
    source = file_source(path)
    assert source.content_hash != before
    assert source.content_hash == BytesSource(path.read_bytes()).content_hash


def test_a_file_that_changed_just_now_is_not_remembered(path, hashed, monkeypatch):
    monkeypatch.setattr(source_module, "_SETTLED_SECONDS", 3600.0)
    file_source(path)
    file_source(path)
    assert sum(hashed) == 2 * len(DATA)


def test_only_so_many_files_are_remembered(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(source_module, "_MAX_REMEMBERED_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    for name in "abcca":
        file_source(tmp_path / name)
    assert sum(hashed) == 4  # a, b, c, not c again, a again


@pytest.fixture
def slow(monkeypatch):
    """Hashing waits at its beginning until it is let go; counts how often it began."""
    let_go, begun = threading.Event(), []
    usual = source_module._hash_of_file

    def hash_of_file(fd, num_bytes, cancel):
        begun.append(fd)
        while not let_go.wait(0.01):
            if cancel is not None and cancel.is_set():
                raise InterruptedError
        return usual(fd, num_bytes, cancel)

    monkeypatch.setattr(source_module, "_hash_of_file", hash_of_file)
    return let_go, begun


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_file_that_many_ask_for_at_once_is_read_by_one(path, hashed, slow):
    let_go, begun = slow
    with ThreadPoolExecutor(4) as threads:
        sources = [threads.submit(file_source, path) for _ in range(4)]
        wait_for(lambda: begun)
        time.sleep(0.1)  # the others had time to begin, too
        let_go.set()
        hashes = {source.result(10).content_hash for source in sources}
    assert hashes == {hashlib.sha256(DATA).hexdigest()}
    assert len(begun) == 1


def test_who_waits_for_another_reads_the_file_when_that_one_gives_up(path, hashed, slow):
    let_go, begun = slow
    cancel = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(file_source, path, cancel=cancel)
        wait_for(lambda: begun)
        second = threads.submit(file_source, path)
        cancel.set()
        with pytest.raises(InterruptedError):
            first.result(10)
        let_go.set()
        assert second.result(10).content_hash == hashlib.sha256(DATA).hexdigest()


def test_waiting_for_another_can_be_cancelled(path, hashed, slow):
    let_go, begun = slow
    cancel = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(file_source, path)
        wait_for(lambda: begun)
        second = threads.submit(file_source, path, cancel=cancel)
        cancel.set()
        with pytest.raises(InterruptedError):
            second.result(10)
        let_go.set()
        first.result(10)
    assert len(begun) == 1


def test_hashing_can_be_cancelled(path, hashed):
    cancel = threading.Event()
    cancel.set()
    descriptors = len(os.listdir("/dev/fd"))
    with pytest.raises(InterruptedError):
        file_source(path, cancel=cancel)
    assert len(os.listdir("/dev/fd")) == descriptors


@pytest.mark.parametrize("max_memory_bytes", [0, 99, 1000, 10**6])
def test_spooled_bytes_come_back(max_memory_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = SpooledBytes(max_memory_bytes)
    for position in range(0, len(DATA), 70_000):
        spool.write(DATA[position : position + 70_000])
    source = spool.finish()
    assert isinstance(source, FileSource)
    with pytest.raises(OSError):  # decoders get the descriptor, and must not change what others read
        os.write(source.fd, b"x")
    assert (source.num_bytes, source.content_hash) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    assert source.open().read() == DATA
    assert list(tmp_path.iterdir()) == []


def test_unfinished_spools_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(os.listdir("/dev/fd"))
    spool = SpooledBytes(10)
    spool.write(DATA)
    assert len(os.listdir("/dev/fd")) == descriptors + 1
    del spool
    assert len(os.listdir("/dev/fd")) == descriptors


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1000, 1001, 2000, 5300])
def test_large_contents_hash_alike_from_bytes_files_and_streams(tmp_path, monkeypatch, num_bytes):
    monkeypatch.setattr(source_module, "_HASH_CHUNK_BYTES", 1000)
    data = bytes(i % 251 for i in range(num_bytes))
    path = tmp_path / "data"
    path.write_bytes(data)
    spool = SpooledBytes(100)
    for position in range(0, num_bytes, 77):
        spool.write(data[position : position + 77])
    pieces = [hashlib.sha256(data[start : start + 1000]).digest() for start in range(0, max(num_bytes, 1), 1000)]
    expected = pieces[0].hex() if len(pieces) == 1 else hashlib.sha256(b"".join(pieces)).hexdigest()
    assert BytesSource(data).content_hash == expected
    assert FileSource(os.open(path, os.O_RDONLY)).content_hash == expected
    assert spool.finish().content_hash == expected


def test_pictures_are_packed_behind_one_descriptor(tmp_path):
    pieces = [b"first", b"", DATA, b"last"]
    sources = [BytesSource(piece) for piece in pieces]
    whole, spans = pack(sources)
    assert whole.num_bytes == sum(map(len, pieces))
    assert [SpanSource(whole, *span).open().read() for span in spans] == pieces
    assert len({SpanSource(whole, *span).content_hash for span in spans}) == len(pieces)
    for start, stop in ((-1, 2), (3, 2), (0, whole.num_bytes + 1)):
        with pytest.raises(ValueError):
            SpanSource(whole, start, stop)


def test_a_source_behind_a_descriptor_is_not_copied(tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    source = FileSource(os.open(tmp_path / "data", os.O_RDONLY))
    assert source_module.file_source(source) is source
    copied = source_module.file_source(BytesSource(DATA))
    assert (copied.open().read(), copied.content_hash) == (DATA, source.content_hash)
