"""Header fields of an HTTP answer in, what they mean for keeping and rereading it out; knows no sockets and no media."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

MAX_FRESH_SECONDS = 600.0
"""Longest time that an answer is used again unasked, whatever its server allows: a file replaced by mistake shows soon."""

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,1024}"')
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")
_DIRECTIVE = re.compile(r'([A-Za-z0-9-]+)(?:=(?:"([^"]*)"|([^\s,]*)))?')
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_SETTLED_SECONDS = 1.0


class Fields:
    """Response headers by lower-case name; repeated ones are joined with commas (RFC 9110 section 5.3)."""

    def __init__(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in headers:
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError:
                text = value.decode("latin-1")
            self._values.setdefault(name.decode("latin-1").lower(), []).append(text.strip())

    def get(self, name: str) -> str:
        """The value, "" if there is none."""
        return ", ".join(self._values.get(name, ()))

    def number(self, name: str) -> int | None:
        """The value as a count, None if it is none."""
        text = self.get(name)
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


@dataclass(frozen=True)
class Validator:
    """What tells one version of a file from all others of the same URL (a strong validator, RFC 9110 section 8.8).

    Either ``etag`` is set, or ``last_modified`` together with the file's size ``num_bytes``.
    """

    etag: str = ""
    last_modified: str = ""
    num_bytes: int | None = None

    @property
    def text(self) -> str:
        """The value as ``If-Range`` has it."""
        return self.etag or self.last_modified

    def condition(self) -> list[tuple[bytes, bytes]]:
        """The header that asks for the file only if it is another version."""
        name = b"If-None-Match" if self.etag else b"If-Modified-Since"
        return [(name, self.text.encode("ascii"))]

    def is_unchanged_in(self, fields: Fields) -> bool:
        """Whether a 304 answer is about this version: it may leave its validators out."""
        name = "etag" if self.etag else "last-modified"
        return fields.get(name) in ("", self.text)

    def is_of_part(self, fields: Fields) -> bool:
        """Whether a 206 answer to ``If-Range`` is of this version: an ETag must be in it (RFC 9110 section 15.3.7)."""
        return fields.get("etag") == self.etag if self.etag else self.is_unchanged_in(fields)


def validator_of(fields: Fields) -> Validator | None:
    """The strong validator of a whole answer, None if it has none.

    A weak ETag does not promise equal bytes and counts for nothing. A date counts only together with the size, and only if
    the answer was made at least a second after it: within that second the file could have changed twice (RFC 9110 section
    8.8.2.2). An answer without a ``Date`` was made when it arrived (section 6.6.1).
    """
    if _STRONG_ETAG.fullmatch(fields.get("etag")):
        return Validator(etag=fields.get("etag"))
    modified, num_bytes = fields.get("last-modified"), fields.number("content-length")
    modified_seconds = _seconds(modified)
    if modified_seconds is None or num_bytes is None:
        return None
    made_seconds = _seconds(fields.get("date")) or time.time()
    if made_seconds - modified_seconds < _SETTLED_SECONDS:
        return None
    return Validator(last_modified=modified, num_bytes=num_bytes)


def may_be_shared(fields: Fields) -> bool:
    """Whether an answer may be given to another request than the one it was fetched for (RFC 9111 section 3).

    Not with ``no-store``; nor with ``private``: what is kept here serves every client of this server, which makes it a
    shared cache, and media servers ask those to keep out. Nor with ``Vary: *``, which no later request ever matches. Other
    ``Vary`` fields do no harm: all our requests are alike.
    """
    directives = _directives(fields)
    return not ({"no-store", "private"} & directives.keys()) and "*" not in fields.get("vary")


def fresh_seconds(fields: Fields) -> float:
    """How long an answer may be used without asking again, at most ``MAX_FRESH_SECONDS`` (RFC 9111 section 4.2).

    0 unless its server says so: nothing is guessed from dates.
    """
    directives = _directives(fields)
    if "no-cache" in directives:
        return 0.0
    now = time.time()
    made_seconds = _seconds(fields.get("date"))
    lifetime = next((directives[name] for name in ("s-maxage", "max-age") if name in directives), None)
    if lifetime is not None:
        lifetime_seconds = float(lifetime) if re.fullmatch("[0-9]{1,10}", lifetime) else 0.0
    else:
        expires_seconds = _seconds(fields.get("expires"))
        lifetime_seconds = 0.0 if expires_seconds is None else expires_seconds - (made_seconds or now)
    apparent_age_seconds = max(now - made_seconds, 0.0) if made_seconds is not None else 0.0
    if fields.get("age") and fields.number("age") is None:
        return 0.0
    age_seconds = max(apparent_age_seconds, fields.number("age") or 0)
    return min(max(lifetime_seconds - age_seconds, 0.0), MAX_FRESH_SECONDS)


def content_range(fields: Fields) -> tuple[int, int, int] | None:
    """First byte, end and total of the part that a 206 answer has, None if it does not say."""
    match = _CONTENT_RANGE.fullmatch(fields.get("content-range"))
    return (int(match[1]), int(match[2]) + 1, int(match[3])) if match else None


def _directives(fields: Fields) -> dict[str, str]:
    """Cache-Control by lower-case name; the first one of each counts."""
    directives: dict[str, str] = {}
    for name, quoted, plain in _DIRECTIVE.findall(fields.get("cache-control")):
        directives.setdefault(name.lower(), quoted or plain)
    return directives


def _seconds(date: str) -> float | None:
    """An HTTP date as seconds since 1970, None if it is none."""
    if not _HTTP_DATE.fullmatch(date):
        return None
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
