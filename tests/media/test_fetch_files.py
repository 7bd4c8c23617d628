"""Local files: attack cases A20 to A23, and what the Python API may read."""

import os
import pathlib
import socket
import urllib.parse

import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaBlockedError, MediaFetchError, MediaTooLargeError
from filmstrip.media import local_files
from filmstrip.media.fetch import Fetcher
from filmstrip.media.local_files import CLOSED_MESSAGE, REFUSED_MESSAGE

CLIP = b"a clip" * 100


def read(source):
    with source.open() as file:
        return file.read()


@pytest.fixture
def tree(tmp_path):
    """root/{clip.mp4, a b%.mp4, deep/clip.mp4, links}, a secret beside it and a sibling that begins alike."""
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "root-evil").mkdir()
    for path in ("root/clip.mp4", "root/a b%.mp4", "root/deep/clip.mp4", "root-evil/x", "secret"):
        (tmp_path / path).write_bytes(CLIP)
    (root / "inside").symlink_to("deep/clip.mp4")
    (root / "up").symlink_to("..")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to("loop")
    (root / "dir").symlink_to("deep")
    os.mkfifo(root / "pipe")
    return tmp_path


@pytest.fixture
def server(tree):
    """A fetcher with the server's rules and a directory."""
    return Fetcher(MediaConfig(allow_local_files=False, allowed_local_media_path=str(tree / "root")))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "FILE:///etc/passwd", "file:/x"]
)
async def test_without_a_directory_files_are_closed_to_clients(url):
    with pytest.raises(MediaBlockedError) as caught:
        await Fetcher(MediaConfig(allow_local_files=False)).fetch(url, param="p")
    assert (caught.value.message, caught.value.param) == (CLOSED_MESSAGE, "p")
    assert "--allowed-local-media-path" in CLOSED_MESSAGE


@pytest.mark.parametrize(
    "name", ["clip.mp4", "deep/clip.mp4", "inside", "dir/clip.mp4", "deep/../clip.mp4", "./clip.mp4", "a b%.mp4"]
)
async def test_files_inside_the_directory_are_read(server, tree, name):
    path = str(tree / "root" / name)
    for url in (path, name, "file://" + urllib.parse.quote(path), "file://localhost" + urllib.parse.quote(path)):
        assert read(await server.fetch(url)) == CLIP


async def test_a_directory_given_as_a_link_is_the_directory_it_leads_to(tree):
    (tree / "link").symlink_to("root")
    server = Fetcher(MediaConfig(allow_local_files=False, allowed_local_media_path=str(tree / "link")))
    assert read(await server.fetch(str(tree / "link" / "clip.mp4"))) == CLIP
    assert read(await server.fetch(str(tree / "root" / "clip.mp4"))) == CLIP


@pytest.mark.parametrize(
    "url",
    [
        "file://R/../secret",
        "file://R/%2e%2e/secret",
        "file://R/%2e%2e%2fsecret",
        "file://R/%252e%252e%252fsecret",
        "file://R/up/secret",
        "file://R/out",
        "file://R/loop",
        "file://R-evil/x",
        "R-evil/x",
        "R/../root-evil/x",
        "R/missing",
        "R/clip.mp4/x",
        "R/clip.mp4\0",
        "file://R/clip.mp4%00",
        "R/deep",
        "R",
        "R/",
        "R/pipe",
        "../secret",
        "up/secret",
        "deep/../../secret",
        "/etc/passwd",
        "/etc/missing",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/fd/0",
        "/proc/self/root/etc/passwd",
        "~/x",
        "x" * 100_000,
    ],
)
async def test_everything_else_gets_one_and_the_same_answer(server, tree, url):
    url = url.replace("R", str(tree / "root"), 1) if "R" in url else url
    with pytest.raises(MediaBlockedError) as caught:
        await server.fetch(url)
    assert caught.value.message == REFUSED_MESSAGE
    assert str(tree) not in REFUSED_MESSAGE


@pytest.mark.parametrize(
    "url", ["file://host/R/clip.mp4", "file:relative", "file://R/clip.mp4?x", "file://R/clip.mp4#x", "file://R/\ud800"]
)
async def test_malformed_file_urls_are_refused(server, tree, url):
    with pytest.raises(MediaBlockedError, match="file URL"):
        await server.fetch(url.replace("R", str(tree / "root")))


async def test_a_directory_that_is_named_holds_where_files_are_open_in_general(tree):
    both = Fetcher(MediaConfig(allow_local_files=True, allowed_local_media_path=str(tree / "root")))
    assert read(await both.fetch(str(tree / "root" / "clip.mp4"))) == CLIP
    with pytest.raises(MediaBlockedError):
        await both.fetch(str(tree / "secret"))


async def test_a_directory_that_does_not_exist_opens_nothing(tree):
    server = Fetcher(MediaConfig(allow_local_files=False, allowed_local_media_path=str(tree / "none")))
    with pytest.raises(MediaBlockedError):
        await server.fetch(str(tree / "none" / ".." / "secret"))


@pytest.mark.parametrize("swap", ["file", "directory"])
async def test_a_link_put_in_after_the_check_is_not_followed(server, tree, monkeypatch, swap):
    real_open_below = local_files._open_below

    def swap_then_open(real_root, names):
        if swap == "file":
            (tree / "root" / "deep" / "clip.mp4").unlink()
            (tree / "root" / "deep" / "clip.mp4").symlink_to(tree / "secret")
        else:
            (tree / "clip.mp4").write_bytes(b"outside")
            (tree / "root" / "deep").rename(tree / "elsewhere")
            (tree / "root" / "deep").symlink_to("..")
        return real_open_below(real_root, names)

    monkeypatch.setattr(local_files, "_open_below", swap_then_open)
    with pytest.raises(MediaBlockedError) as caught:
        await server.fetch(str(tree / "root" / "deep" / "clip.mp4"))
    assert caught.value.message == REFUSED_MESSAGE


async def test_a_pipe_put_in_after_the_look_does_not_block(server, tree, monkeypatch):
    clip = tree / "root" / "clip.mp4"
    real_check = local_files._check_regular
    swapped = []

    def check_then_swap(status):
        real_check(status)
        if not swapped:
            swapped.append(True)
            clip.unlink()
            os.mkfifo(clip)

    monkeypatch.setattr(local_files, "_check_regular", check_then_swap)
    with pytest.raises(MediaBlockedError):
        await server.fetch(str(clip))


async def test_a_huge_sparse_file_is_refused_unread(server, tree):
    (tree / "root" / "huge.mp4").touch()
    os.truncate(tree / "root" / "huge.mp4", 1 << 40)
    with pytest.raises(MediaTooLargeError, match=r"1099511627776 bytes; the limit is 2147483648 .*--max-media-bytes"):
        await server.fetch(str(tree / "root" / "huge.mp4"))


async def test_an_empty_file_is_an_error(tree):
    (tree / "empty").touch()
    with pytest.raises(MediaFetchError, match="empty"):
        await Fetcher(MediaConfig()).fetch(str(tree / "empty"))


# The Python API


async def test_python_reads_any_file(tree, monkeypatch):
    fetcher = Fetcher(MediaConfig())
    monkeypatch.chdir(tree / "root")
    monkeypatch.setenv("HOME", str(tree / "root"))
    for url in ("clip.mp4", "../secret", "out", "~/clip.mp4", str(tree / "secret"), f"file://{tree}/secret"):
        assert read(await fetcher.fetch(url)) == CLIP
        assert read(fetcher.fetch_sync(url)) == CLIP
    assert read(fetcher.fetch_sync(pathlib.Path("clip.mp4"))) == CLIP


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.mp4", r"no such file: '.*/root/missing\.mp4'"),
        ("clip.mp4/x", "no such file"),
        ("deep", "not a regular file"),
        ("pipe", "not a regular file"),
        ("loop", "cannot read the file"),
        ("a\0b", "not a valid path"),
    ],
)
async def test_python_is_told_the_path(tree, path, message):
    with pytest.raises(MediaFetchError, match=message):
        await Fetcher(MediaConfig()).fetch(str(tree / "root" / path))


async def test_sockets_are_not_files(tree, monkeypatch):
    monkeypatch.chdir(tree)  # socket names are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(MediaFetchError, match="not a regular file"):
            await Fetcher(MediaConfig()).fetch("socket")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_unreadable_files_are_errors(tree):
    (tree / "secret").chmod(0)
    with pytest.raises(MediaFetchError, match="Permission denied"):
        await Fetcher(MediaConfig()).fetch(str(tree / "secret"))
