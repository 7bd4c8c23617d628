"""Which URLs and addresses are allowed: attack cases A01 to A10 as far as text decides them."""

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filmstrip.errors import MediaBlockedError
from filmstrip.media.address import HttpTarget, is_public_address, parse_http_url, parse_redirect


def _words(text):
    return text.split()


HERE = HttpTarget("https", "allowed.test", 443, "/videos/clip.mp4")


@pytest.mark.parametrize(
    ("url", "host", "port", "target"),
    [
        ("http://allowed.test", "allowed.test", 80, "/"),
        ("HTTPS://ALLOWED.test./x", "allowed.test", 443, "/x"),
        ("http://allowed.test:8080/a/b?c=d#e", "allowed.test", 8080, "/a/b?c=d"),
        ("http://allowed.test?q=1", "allowed.test", 80, "/?q=1"),
        ("http://8.8.8.8/x", "8.8.8.8", 80, "/x"),
        ("http://[2606:4700:0::1111]:81/x", "2606:4700::1111", 81, "/x"),
        ("http://bücher.example/é", "xn--bcher-kva.example", 80, "/%C3%A9"),
        ("http://a_b.example/user@name", "a_b.example", 80, "/user@name"),
    ],
)
def test_urls_are_read(url, host, port, target):
    parsed = parse_http_url(url)
    assert (parsed.host, parsed.port, parsed.target) == (host, port, target)


def test_authority_names_the_port_unless_it_is_the_default():
    assert parse_http_url("http://[2606:4700::1]:80/").authority == "[2606:4700::1]"
    assert parse_http_url("https://allowed.test:80/").url == "https://allowed.test:80/"


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://0x7f.1/",
        "http://0x7f000001/",
        "http://127.1/",
        "http://127.0.0.01/",
        "http://1.2.3.4.5/",
        "http://１２７.1/",
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::ffff:127.0.0.1/",
        "http://[v1.x]/",
        "http://allowed.test\\@127.0.0.1/",
        "http://127.0.0.1\\@allowed.test/",
        "http://allowed.test@127.0.0.1/",
        "http://user:word@allowed.test/",
        "http://allowed.test#@127.0.0.1/",
        "http://allowed.test?@127.0.0.1/",
        "http://allowed\t.test/",
        "http://allowed.test\r\n/",
        "http://allowed test/",
        "http://allowed.test/\u00a0x",
        " http://allowed.test/",
        "http://allowed.test\x00/",
        "http://allowed.test%00/",
        "http://allowed%2etest/",
        "http://allowed.test/\ud800",
        "http:///x",
        "http:x",
        "http:/allowed.test/x",
        "http://",
        "http://:80/",
        "http://.../",
        "http://allowed.test:0/",
        "http://allowed.test:65536/",
        "http://allowed.test:80:80/",
        "http://allowed.test:8o/",
        "http://allowed.test:/",
        "http://-allowed.test/",
        "http://" + "a" * 64 + ".test/",
        "http://" + "a." * 130 + "test/",
        "http://faß.example/",
        "http://a\u200db.example/",
        "http://allowed.test/" + "x" * 20_000,
        "ftp://allowed.test/x",
        "gopher://allowed.test/x",
        "allowed.test/x",
    ],
)
def test_odd_urls_are_refused(url):
    with pytest.raises(MediaBlockedError):
        parse_http_url(url)


@given(
    st.from_regex(
        re.compile(r"https?:/?/?[\x00-\x7f\u00df\u2488\uff0e\uff11a-z0-9.:@%\[\]\\/?#-]{0,40}"), fullmatch=True
    )
)
def test_whatever_is_accepted_has_a_host_in_normal_form(url):
    try:
        target = parse_http_url(url)
    except MediaBlockedError:
        return
    assert re.fullmatch(r"[a-z0-9_.-]+|[0-9a-f:.]+", target.host)
    assert re.fullmatch(r"/[\x21-\x7e]*", target.target)
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", target.host.split(".")[-1]):
        assert str(ipaddress.ip_address(target.host)) == target.host
    assert parse_http_url(target.url) == target


@pytest.mark.parametrize(
    "address",
    _words("""127.0.0.1 127.255.255.255 ::1 0.0.0.0 :: 169.254.169.254 fd00:ec2::254 fe80::1 fe80::1%eth0 10.0.0.1 172.16.0.1
    172.31.255.255 192.168.1.1 100.64.0.1 100.100.100.200 192.0.0.192 192.0.2.1 198.51.100.7 203.0.113.9 198.18.0.1
    192.88.99.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16 ::ffff:127.0.0.1 ::ffff:10.0.0.1
    ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1:: 2002:808:808:: 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1
    3fff::1 100::1 fc00::1 fec0::1 ff02::1 ff0e::1 4000::1 0177.0.0.1 2130706433 127.1 localhost 8.8.8.8/32"""),
)
def test_addresses_that_are_not_public(address):
    assert not is_public_address(address)


@pytest.mark.parametrize(
    "address",
    _words("""8.8.8.8 1.1.1.1 172.32.0.1 100.128.0.1 192.0.1.1 223.255.255.255 2606:4700::1111 2a00:1450:4001::1
    64:ff9b::808:808"""),
)
def test_addresses_that_are_public(address):
    assert is_public_address(address)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/other", "https://allowed.test/other"),
        ("other?x=1", "https://allowed.test/videos/other?x=1"),
        ("//cdn.test/x", "https://cdn.test/x"),
        ("http://cdn.test/x", "http://cdn.test/x"),
        ("HTTPS://cdn.test/é", "https://cdn.test/%C3%A9"),
    ],
)
def test_redirects_are_resolved(location, url):
    assert parse_redirect(location, HERE, same_port_only=True).url == url


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://allowed.test/x",
        "data:video/mp4;base64,AAAA",
        "javascript:alert(1)",
        "http:x",
        "https:///x",
        "//user@127.0.0.1/",
        "\\\\127.0.0.1/x",
        "/a\tb",
        "//[",
        "http://2130706433/",
        "https://allowed.test:22/x",
        "https://cdn.test:8443/x",
    ],
)
def test_redirects_that_are_refused(location):
    with pytest.raises(MediaBlockedError):
        parse_redirect(location, HERE, same_port_only=True)


def test_redirects_may_keep_their_port_and_change_it_where_private_addresses_are_allowed():
    here = HttpTarget("http", "allowed.test", 8080, "/")
    assert parse_redirect("/x", here, same_port_only=True).port == 8080
    assert parse_redirect("http://allowed.test:9000/x", here, same_port_only=False).port == 9000
