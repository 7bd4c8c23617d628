"""Local media files: a path or ``file:`` URL to an open descriptor, anywhere or inside one directory; never blocks.

Inside a directory the answer to "missing", "outside" and "not a file" is one and the same error, so that a stranger learns
nothing about the machine; the path that was checked is the path that is opened, whatever is renamed or linked meanwhile.
"""

from __future__ import annotations

import os
import stat
from urllib.parse import unquote_to_bytes

from filmstrip.errors import MediaBlockedError, MediaFetchError

# O_NONBLOCK: opening a pipe that nobody writes to must not wait. O_NOCTTY: nor may a terminal become ours.
_OPEN_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

CLOSED_MESSAGE = (
    "local files are not open to this server's clients; --allowed-local-media-path DIR opens one directory to them"
)
REFUSED_MESSAGE = "the file cannot be read: no such media file inside the directory of --allowed-local-media-path"


def file_url_path(url: str) -> str:
    """The path of a ``file:`` URL, percent-decoded once; raises MediaBlockedError for other hosts and malformed URLs."""
    rest = url[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise MediaBlockedError("a file URL cannot name another host; write file:///absolute/path")
        rest = slash + path
    if not rest.startswith("/"):
        raise MediaBlockedError("a file URL must have an absolute path: file:///absolute/path")
    if "?" in rest or "#" in rest:
        raise MediaBlockedError("a file URL has no query or fragment; percent-encode ? and # (%3F, %23)")
    try:
        return os.fsdecode(unquote_to_bytes(rest.encode("utf-8")))
    except UnicodeEncodeError:
        raise MediaBlockedError("a file URL must be valid Unicode text") from None


def open_anywhere(path: str) -> int:
    """Open the regular file ``path`` (``~`` is the home directory); for callers who may read what this process may.

    Raises MediaFetchError that names the path.
    """
    shown = repr(path[:300])
    try:
        return _open_regular(os.path.expanduser(path), follow_symlinks=True)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaFetchError(f"no such file: {shown}") from None
    except IsADirectoryError:
        raise MediaFetchError(f"not a regular file: {shown}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character or a lone surrogate in the path
        reason = error.strerror if isinstance(error, OSError) else "not a valid path"
        raise MediaFetchError(f"cannot read the file {shown}: {reason}") from None


def open_inside(root: str, path: str) -> int:
    """Open the regular file ``path`` if it lies inside the directory ``root`` once all links are followed.

    A relative path is relative to ``root``. Links may lead anywhere inside ``root`` but not out of it. Raises
    MediaBlockedError, always with the same message, else.
    """
    try:
        real_root = os.path.realpath(root, strict=True)
        # Outside the root nothing is looked at, not even for links: a plain comparison comes first.
        wanted = os.path.normpath(os.path.join(real_root, path))
        if not (_is_inside(wanted, real_root) or _is_inside(wanted, os.path.abspath(root))):
            raise MediaBlockedError(REFUSED_MESSAGE)
        # Not normalised: "link/.." is the parent of what the link points to, as for every other program.
        real_path = os.path.realpath(os.path.join(real_root, path), strict=True)
        if not _is_inside(real_path, real_root):
            raise MediaBlockedError(REFUSED_MESSAGE)
        return _open_below(real_root, os.path.relpath(real_path, real_root).split(os.sep))
    except (OSError, ValueError):
        raise MediaBlockedError(REFUSED_MESSAGE) from None


def _is_inside(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip(os.sep) + os.sep)


def _open_below(real_root: str, names: list[str]) -> int:
    """Walk down from ``real_root`` following no link: any that is met now was put there after the check."""
    directory = os.open(real_root, _OPEN_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in names[:-1]:
            below = os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = below
        return _open_regular(names[-1], follow_symlinks=False, directory=directory)
    finally:
        os.close(directory)


def _open_regular(path: str, *, follow_symlinks: bool, directory: int | None = None) -> int:
    """Open ``path`` for reading; IsADirectoryError if it is anything but a regular file."""
    # Looked at before it is opened, because opening some devices does something, and again after, because it may be another.
    _check_regular(os.stat(path, dir_fd=directory, follow_symlinks=follow_symlinks))
    fd = os.open(path, _OPEN_FILE | (0 if follow_symlinks else os.O_NOFOLLOW), dir_fd=directory)
    try:
        _check_regular(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError("not a regular file")
