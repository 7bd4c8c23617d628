"""Attack cases A20 to A23: paths and file URLs that must not reach what is outside the one directory."""

import contextlib
import dataclasses
import os
import socket
import threading
from pathlib import Path

import pytest

from filmstrip.media.local_files import REFUSED_MESSAGE
from tests.attacks.harness import Case, attacks, check_error, question
from tests.attacks.open_watch import OpenWatch
from tests.media.numbered import encode

NUM_SECRET_FRAMES = 30
TERABYTE = 1 << 40


@pytest.fixture(scope="module")
def secret(media_root):
    """A good clip outside the root: whoever reaches it gets an answer, not an error."""
    path = media_root.parent / "secret.mp4"
    return encode(path, "-c:v", "libx264", "-pix_fmt", "yuv420p", num_frames=NUM_SECRET_FRAMES)


@pytest.fixture(scope="module")
def traps(media_root, secret, clip):
    """The root with everything in it that could lead out of it or never end."""
    root = media_root
    (root / "a b#?.mp4").write_bytes(clip)
    (root / "folder").mkdir()
    (root / "folder" / "clip.mp4").write_bytes(clip)
    (root / "inside-link.mp4").symlink_to("folder/clip.mp4")
    (root / "link-out.mp4").symlink_to("../secret.mp4")
    (root / "link-out-absolute.mp4").symlink_to(secret)
    (root / "link-to-link.mp4").symlink_to("link-out.mp4")
    (root / "link-folder").symlink_to("..")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "link-zero").symlink_to("/dev/zero")
    (root / "link-proc").symlink_to("/proc/self")
    os.mkfifo(root / "pipe.mp4")
    with (root / "huge.mp4").open("wb") as file:
        file.truncate(TERABYTE)
    with contextlib.suppress(PermissionError):  # only the administrator makes devices
        os.mknod(root / "zero.mp4", 0o666 | 0o020000, os.makedev(1, 5))
    listener = socket.socket(socket.AF_UNIX)
    with _working_in(root):  # a socket's path has to be short
        listener.bind("socket.mp4")
    evil = root.parent / "R-evil"
    evil.mkdir()
    (evil / "clip.mp4").write_bytes(secret.read_bytes())
    yield root
    listener.close()


@contextlib.contextmanager
def _working_in(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def refused(name, url):
    return Case(name, url, codes=("media_blocked",))


OUTSIDE = [
    refused("A20-passwd-url", "file:///etc/passwd"),
    refused("A20-passwd", "/etc/passwd"),
    refused("A20-dots", "../../../../etc/passwd"),
    refused("A20-home", "~/.bashrc"),
    refused("A20-missing", "/no/such/file.mp4"),
    refused("A21-dots-url", "file://{R}/../secret.mp4"),
    refused("A21-dots", "{R}/../secret.mp4"),
    refused("A21-dots-relative", "../secret.mp4"),
    refused("A21-dots-below", "file://{R}/folder/../../secret.mp4"),
    refused("A21-dots-below-a-file", "file://{R}/clip.mp4/../../secret.mp4"),
    refused("A21-encoded-dots", "file://{R}/%2e%2e/secret.mp4"),
    refused("A21-encoded-slash", "file://{R}/%2e%2e%2fsecret.mp4"),
    refused("A21-twice-encoded", "file://{R}/%252e%252e%252fsecret.mp4"),
    refused("A21-encoded-path", "{R}/%2e%2e/secret.mp4"),
    refused("A21-backslashes", "file://{R}/..\\secret.mp4"),
    refused("A21-overlong-utf8", "file://{R}/%c0%ae%c0%ae/secret.mp4"),
    refused("A21-link", "file://{R}/link-out.mp4"),
    refused("A21-link-absolute", "file://{R}/link-out-absolute.mp4"),
    refused("A21-link-to-link", "file://{R}/link-to-link.mp4"),
    refused("A21-link-folder", "file://{R}/link-folder/secret.mp4"),
    refused("A21-link-folder-dots", "file://{R}/link-folder/../secret.mp4"),
    refused("A21-link-loop", "file://{R}/loop.mp4"),
    refused("A21-link-to-device", "file://{R}/link-zero"),
    refused("A21-link-to-proc", "file://{R}/link-proc/fd/0"),
    refused("A21-sibling", "file://{R}-evil/clip.mp4"),
    refused("A21-sibling-dots", "file://{R}/../R-evil/clip.mp4"),
    refused("A21-other-host", "file://host{R}/clip.mp4"),
    refused("A21-address-host", "file://127.0.0.1{R}/clip.mp4"),
    refused("A21-proc-fd", "/proc/self/fd/0"),
    refused("A21-proc-root", "file:///proc/self/root{R}/clip.mp4"),
    refused("A21-proc-environ", "file:///proc/self/environ"),
    refused("A21-dev-fd", "/dev/fd/0"),
    refused("A21-dev-stdin", "/dev/stdin"),
    refused("A21-zero", "file:///dev/zero"),
    refused("A21-fifo", "file://{R}/pipe.mp4"),
    refused("A21-device", "file://{R}/zero.mp4"),
    refused("A21-socket", "file://{R}/socket.mp4"),
    refused("A21-directory", "file://{R}/folder"),
    refused("A21-root", "file://{R}"),
    refused("A21-root-slash", "file://{R}/"),
    refused("A21-nul", "file://{R}/clip.mp4%00.png"),
    refused("A21-nul-path", "{R}/clip.mp4\0.png"),
    refused("A21-query", "file://{R}/clip.mp4?x"),
    refused("A21-relative-url", "file:clip.mp4"),
    refused("A21-empty", "file://"),
    refused("A21-long", "file://{R}/" + "a/" * 5000),
    Case("A21-surrogate", "{R}/\ud800.mp4", codes=("invalid_json",), param=""),
    refused("A23-missing", "file://{R}/missing.mp4"),
    refused("A23-missing-outside", "file://{R}/../missing.mp4"),
]


@attacks(OUTSIDE)
def test_nothing_outside_is_opened(server, traps, secret, case, kind, stream):
    with OpenWatch([secret, traps.parent / "R-evil" / "clip.mp4"]) as watch:
        error = server.check_refused(_in(case, traps), kind, stream)
        assert watch.opened() == []
    assert "secret" not in error["message"]
    assert str(traps) not in error["message"]


def _in(case, root):
    return dataclasses.replace(case, url=case.url.replace("{R}", str(root)))


@attacks([Case("A21-sparse-terabyte", "file://{R}/huge.mp4", codes=("media_too_large",), words="--max-media-bytes")])
def test_a_terabyte_is_refused_by_its_size(server, traps, case, kind, stream):
    server.check_refused(_in(case, traps), kind, stream)


def test_a23_missing_and_forbidden_are_told_alike(server, traps):
    """No answer says whether a file is there: all have the same words, but for what the URL's own form shows."""
    paths = ["/etc/passwd", "/etc/no-such", f"{traps}/missing.mp4", f"{traps}/../secret.mp4", f"{traps}/../missing.mp4"]
    paths += [f"{traps}/link-out.mp4", f"{traps}/pipe.mp4", f"{traps}/folder", f"{traps}/loop.mp4", "/proc/self/mem"]
    messages = {
        check_error(server.post(question(form + path, "video_url")))["message"]
        for path in paths
        for form in ("", "file://")
    }
    assert messages == {REFUSED_MESSAGE}


@pytest.mark.parametrize("url", ["{R}/clip.mp4", "clip.mp4", "{R}/inside-link.mp4", "file://{R}/a%20b%23%3F.mp4"])
def test_what_is_inside_is_read(server, traps, url):
    """What all refusals above are worth nothing without."""
    answer = server.post(question(url.replace("{R}", str(traps)), "video_url", num_frames=2))
    assert answer.status_code == 200, answer.text


class Swapper(threading.Thread):
    """Puts ``good`` and ``bad`` in the place of ``target`` by turns, as fast as it can."""

    def __init__(self, target, good, bad):
        super().__init__(daemon=True)
        self._target, self._makers, self._stopped = target, (good, bad), threading.Event()
        self.num_swaps = 0

    def run(self):
        new = self._target.with_name("swapping")
        old = self._target.with_name("swapped")
        while not self._stopped.is_set():
            self._makers[self.num_swaps % 2](new)
            if self._target.is_dir() and not self._target.is_symlink():  # a directory cannot be replaced by a link
                self._target.rename(old)
                new.rename(self._target)
                (old / "clip.mp4").unlink()
                old.rmdir()
            elif new.is_dir() and not new.is_symlink():
                self._target.unlink()
                new.rename(self._target)
            else:
                new.replace(self._target)
            self.num_swaps += 1

    def stop(self):
        self._stopped.set()
        self.join(10)


def _seen_while_swapping(server, swapper, url, secret):
    """Numbers of frames in the answers to a clip that changes all the time."""
    swapper.start()
    seen = []
    with OpenWatch([secret]) as watch:
        try:
            for _ in range(60):
                answer = server.post(question(url, "video_url", num_frames=32), return_media_info=True)
                if answer.status_code == 200:
                    seen.append(answer.json()["media"][0]["num_frames"])
                else:
                    check_error(answer)
        finally:
            swapper.stop()
        assert watch.opened() == []
    assert swapper.num_swaps > 60
    return seen


def test_a22_a_file_that_becomes_a_link(server, traps, clip, secret):
    target = traps / "race.mp4"
    target.write_bytes(clip)
    swapper = Swapper(target, lambda path: path.write_bytes(clip), lambda path: path.symlink_to("../secret.mp4"))
    seen = _seen_while_swapping(server, swapper, f"file://{target}", secret)
    assert NUM_SECRET_FRAMES not in seen
    server.check_still_good()


def test_a22_a_folder_that_becomes_a_link(server, traps, clip, secret):
    outside = traps.parent / "outside"
    outside.mkdir()
    os.link(secret, outside / "clip.mp4")
    target = traps / "race"

    def folder(path):
        path.mkdir()
        (path / "clip.mp4").write_bytes(clip)

    folder(target)
    swapper = Swapper(target, folder, lambda path: path.symlink_to(outside))
    seen = _seen_while_swapping(server, swapper, f"file://{target}/clip.mp4", secret)
    assert NUM_SECRET_FRAMES not in seen
    server.check_still_good()


def test_a_fifo_with_a_writer_is_not_waited_for(server, traps):
    reader = os.open(traps / "pipe.mp4", os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_error(server.post(question(f"file://{traps}/pipe.mp4", "video_url")))
    finally:
        os.close(reader)
