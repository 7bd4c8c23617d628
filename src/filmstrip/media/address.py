"""Which web addresses media may come from: URL text to a checked target, IP addresses to yes or no; knows no sockets.

URL parsers disagree on odd input, and a server fetching for strangers must not be the one that is fooled: whatever two
parsers could read differently (user information, backslashes, numbers standing for addresses, ...) is refused.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from filmstrip.errors import MediaBlockedError

MAX_URL_CHARS = 16_384
DEFAULT_PORTS = {"http": 80, "https": 443}

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_UNREADABLE = re.compile("[\\s\\\\\x00-\x20\x7f-\x9f\ud800-\udfff]")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Characters that the 2003 and 2008 rules for international names turn into different domains.
_AMBIGUOUS_IN_NAMES = re.compile("[\u00df\u03c2\u200c\u200d]")

# From IANA's special-purpose address registries (RFC 6890), written out because the tables inside Python's ipaddress module
# differ between versions. 168.63.129.16 is inside no such block but is Azure's machine-local platform address.
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Of IPv6 only global unicast is public, less what is documentation or a tunnel to an IPv4 address (Teredo, 6to4).
_GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class HttpTarget:
    """A URL taken apart: ``host`` is lower-case ASCII without brackets or final dot, ``target`` is the path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL in normal form."""
        return f"{self.scheme}://{self.authority}{self.target}"


def url_scheme(url: str) -> str:
    """The scheme in lower case, or "" if the text is a plain path."""
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else ""


def parse_http_url(url: str) -> HttpTarget:
    """Take an ``http`` or ``https`` URL apart; raises MediaBlockedError for another scheme and for an odd spelling."""
    scheme = url_scheme(url)
    if scheme not in DEFAULT_PORTS:
        raise MediaBlockedError(f"the scheme {scheme[:40]!r} is not supported for downloads; http and https are")
    _check_readable(url)
    if not url[len(scheme) :].startswith("://"):
        raise MediaBlockedError(f"the URL must begin with {scheme}://")
    rest = url[len(scheme) + 3 :]
    if "@" in rest.split("/", 1)[0]:
        raise MediaBlockedError("the URL has user information (an @ before the path), which is not supported")
    end = re.search(r"[/?#]", rest)
    authority, target = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise MediaBlockedError("the URL has no valid host and port")
    port = int(match["port"]) if match["port"] is not None else DEFAULT_PORTS[scheme]
    if not 1 <= port <= 65535:
        raise MediaBlockedError(f"the URL has port {port}; ports are 1 to 65535")
    return HttpTarget(scheme, _normal_host(match["host"]), port, _normal_target(target))


def parse_redirect(location: str, current: HttpTarget, *, same_port_only: bool) -> HttpTarget:
    """The target of a redirect from ``current``, under the same rules as a first URL.

    With ``same_port_only`` it may lead to a default port or stay on the current one: a media server has no business sending
    us to other services. Raises MediaBlockedError.
    """
    _check_readable(location)  # before urljoin, which would silently drop some of what is refused
    try:
        # urljoin reads "http:x" as a path relative to the current host; with a scheme the strict parser alone decides.
        url = location if url_scheme(location) else urljoin(current.url, location)
    except ValueError:
        raise MediaBlockedError("the media server redirects to something that is not a URL") from None
    target = parse_http_url(url)
    allowed = (DEFAULT_PORTS[target.scheme], current.port if target.host == current.host else None)
    if same_port_only and target.port not in allowed:
        raise MediaBlockedError("the media server redirects to another port, which is not followed")
    return target


def normal_domain(domain: str) -> str:
    """A host name or address (IPv6 with or without brackets) as :class:`HttpTarget` has it: equal text is the same host.

    Raises MediaBlockedError for anything else, such as a port, a scheme, a wildcard or an address in an unusual form.
    """
    _check_readable(domain)
    match = _AUTHORITY.fullmatch(f"[{domain}]" if isinstance(parse_address(domain), ipaddress.IPv6Address) else domain)
    if match is None or match["port"] is not None:
        raise MediaBlockedError("not a host name or address")
    return _normal_host(match["host"])


def parse_address(text: str) -> IPAddress | None:
    """``text`` as an IP address in its one normal spelling (no scope id), or None."""
    if "%" in text:
        return None
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def is_public_address(text: str) -> bool:
    """Whether ``text`` is an IP address reachable on the public internet.

    False for private, loopback, link-local, shared (CGNAT), documentation, benchmark, multicast, reserved and unspecified
    addresses, for anything with a scope id, and for IPv6 forms (mapped, NAT64) of an IPv4 address for which it is False.
    """
    address = parse_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            return address in _GLOBAL_UNICAST_V6 and not any(address in network for network in _NOT_PUBLIC_V6)
    return address is not None and not any(address in network for network in _NOT_PUBLIC_V4)


def _check_readable(url: str) -> None:
    """Raise if ``url`` is too long or has characters that some parsers drop or take for others."""
    if len(url) > MAX_URL_CHARS:
        raise MediaBlockedError(f"the URL has {len(url)} characters; the limit is {MAX_URL_CHARS}")
    if _UNREADABLE.search(url):
        raise MediaBlockedError("the URL has white space, control characters or a backslash; percent-encode them")


def _normal_host(host: str) -> str:
    """Lower-case ASCII name, or address in normal form without brackets."""
    if host.startswith("["):
        address = parse_address(host[1:-1])
        if not isinstance(address, ipaddress.IPv6Address):
            raise MediaBlockedError("the URL's host is not a valid IPv6 address")
        return str(address)
    name = _ascii_name(host).removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise MediaBlockedError("the URL's host is not a valid name")
    # A name whose last label is a number is an IPv4 address to most resolvers, in one of many spellings (octal, hex, short).
    if _NUMBER.fullmatch(labels[-1]):
        address = parse_address(name)
        if address is None:
            raise MediaBlockedError("the URL's host is an address in an unusual form; write it as a.b.c.d")
        return str(address)
    return name


def _ascii_name(host: str) -> str:
    """International names as punycode."""
    if host.isascii():
        return host.lower()
    if len(host) > 253 or _AMBIGUOUS_IN_NAMES.search(host):
        raise MediaBlockedError("the URL's host is not a plain international name; write it in punycode (xn--...)")
    try:
        return host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise MediaBlockedError("the URL's host is not a valid international name") from None


def _normal_target(target: str) -> str:
    """Path and query to send: without the fragment, beginning with a slash, other than ASCII percent-encoded."""
    target = target.split("#", 1)[0]
    if not target.startswith("/"):
        target = f"/{target}"
    return quote(target, safe="".join(chr(code) for code in range(0x21, 0x7F)))
