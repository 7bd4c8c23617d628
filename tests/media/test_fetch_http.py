"""Downloads: attack cases A01 to A13 against servers on 127.0.0.1 that count their hits."""

import asyncio
import gzip
import os
import shutil
import ssl
import subprocess

import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import MediaBlockedError, MediaFetchError, MediaTooLargeError
from filmstrip.media import fetch as fetch_module
from filmstrip.media.fetch import Fetcher
from filmstrip.media.http_client import deadline
from filmstrip.media.source import BytesSource, FileSource
from tests.media.web import OTHER_PUBLIC, PUBLIC, FakeNetwork, FakeResolver, replying, serving

CLIP = bytes(range(256)) * 40


def fetcher_for(site, resolver=None, routes=None, ssl_context=None, **config):
    """A fetcher for which allowed.test is ``site`` on port 80 of a public address."""
    resolver = resolver or FakeResolver(allowed_test=[[PUBLIC]])
    network = FakeNetwork({(PUBLIC, 80): site.port, (PUBLIC, 443): site.port, **(routes or {})})
    config = MediaConfig(**{"fetch_timeout_seconds": 20.0, **config})
    fetcher = Fetcher(config, resolver, network=network, ssl_context=ssl_context)
    return fetcher, network, resolver


def read(source):
    with source.open() as file:
        return file.read()


async def refusal(fetcher, url, kind=MediaFetchError):
    """The error for ``url``, which must name the request field and no address."""
    with pytest.raises(kind) as caught:
        await fetcher.fetch(url, param="messages[0]")
    assert caught.value.param == "messages[0]"
    for secret in ("127.0.0.1", PUBLIC, OTHER_PUBLIC, "Traceback", "0x"):
        assert secret not in caught.value.message
    return caught.value


async def test_a_download_arrives_whole():
    async with serving(replying(CLIP)) as site:
        fetcher, network, _ = fetcher_for(site)
        source = await fetcher.fetch("http://allowed.test/clip.mp4?sig=1#t=3")
        assert isinstance(source, FileSource)
        assert read(source) == CLIP
        assert source.content_hash == BytesSource(CLIP).content_hash
        assert network.dialled == [(PUBLIC, 80)]
        assert site.requests[0].startswith("GET /clip.mp4?sig=1 HTTP/1.1\r\nHost: allowed.test\r\n")


async def test_a_request_carries_no_credentials_and_asks_for_no_encoding():
    async with serving(replying(CLIP)) as site:
        fetcher, _, _ = fetcher_for(site)
        await fetcher.fetch("http://allowed.test/clip.mp4")
    head = site.requests[0].lower()
    assert "accept-encoding: identity\r\n" in head
    for name in ("authorization", "cookie", "referer", "proxy-"):
        assert name not in head


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"])
async def test_loopback_is_refused_without_a_hit(host):
    async with serving(replying(CLIP)) as site:
        fetcher = Fetcher(MediaConfig())
        await refusal(fetcher, f"http://{host}:{site.port}/x.mp4", MediaBlockedError)
        await fetcher.close()
        assert site.num_connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/",
        "http://10.1.2.3/",
        "http://100.64.0.1/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://192.0.2.1/",
        "http://[2002:7f00:1::]/",
        "https://192.168.0.1/",
    ],
)
async def test_addresses_that_are_not_public_are_never_dialled(url):
    fetcher, network, _ = fetcher_for(Unreachable())
    await refusal(fetcher, url, MediaBlockedError)
    assert network.dialled == []


class Unreachable:
    port = 1


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"],
        [PUBLIC, "10.0.0.1"],
        ["10.0.0.1", PUBLIC],
        ["fe80::1%eth0"],
        ["::ffff:127.0.0.1"],
        ["not an address"],
    ],
)
async def test_one_private_answer_refuses_the_name(answers):
    fetcher, network, _ = fetcher_for(Unreachable(), FakeResolver(allowed_test=[answers]))
    await refusal(fetcher, "http://allowed.test/", MediaBlockedError)
    assert network.dialled == []


async def test_a_name_that_changes_its_address_is_asked_once():
    async with serving(replying(CLIP)) as site, serving(replying(b"internal")) as internal:
        resolver = FakeResolver(allowed_test=[[PUBLIC], ["127.0.0.1"]])
        fetcher, network, _ = fetcher_for(site, resolver, {("127.0.0.1", 80): internal.port})
        assert read(await fetcher.fetch("http://allowed.test/clip.mp4")) == CLIP
        assert (resolver.asked, network.dialled, internal.num_connections) == (["allowed.test"], [(PUBLIC, 80)], 0)
        # The next fetch asks again and is refused: nothing is remembered that would make the first answer last.
        await refusal(fetcher, "http://allowed.test/clip.mp4", MediaBlockedError)
        assert internal.num_connections == 0


async def test_the_second_address_is_tried_when_the_first_does_not_answer():
    async with serving(replying(CLIP)) as site:
        resolver = FakeResolver(allowed_test=[[OTHER_PUBLIC, PUBLIC]])
        fetcher, network, _ = fetcher_for(site, resolver)
        assert read(await fetcher.fetch("http://allowed.test/")) == CLIP
        assert network.dialled == [(OTHER_PUBLIC, 80), (PUBLIC, 80)]


async def test_private_addresses_can_be_allowed():
    async with serving(replying(CLIP)) as site:
        fetcher = Fetcher(MediaConfig(allow_private_media_urls=True))
        assert read(await fetcher.fetch(f"http://127.0.0.1:{site.port}/clip.mp4")) == CLIP
        assert read(await fetcher.fetch(f"http://localhost:{site.port}/clip.mp4")) == CLIP
        await fetcher.close()


async def test_the_sync_form_works_inside_a_running_loop_and_outside():
    async with serving(replying(CLIP)) as site:
        fetcher = Fetcher(MediaConfig(allow_private_media_urls=True))
        source = await asyncio.to_thread(fetcher.fetch_sync, f"http://127.0.0.1:{site.port}/clip.mp4")
        assert read(source) == CLIP
        assert read(fetcher.fetch_sync("data:video/mp4;base64,AAAA")) == b"\0\0\0"
        await fetcher.close()


async def test_proxies_of_the_environment_are_not_used(monkeypatch):
    async with serving(replying(b"proxied")) as proxy, serving(replying(CLIP)) as site:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        fetcher, _, _ = fetcher_for(site)
        assert read(await fetcher.fetch("http://allowed.test/")) == CLIP
        await refusal(fetcher, "http://127.0.0.1/", MediaBlockedError)
        assert proxy.num_connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/",
        "http://allowed.test\\@127.0.0.1/",
        "http://allowed.test@127.0.0.1/",
        "ftp://allowed.test/x",
        "gopher://allowed.test/",
        "rtsp://allowed.test/",
        "concat:a|b",
        "javascript:1",
        "s3://bucket/x",
    ],
)
async def test_odd_urls_and_schemes_are_refused_before_anything_is_asked(url):
    fetcher, network, resolver = fetcher_for(Unreachable(), allow_local_files=False)
    await refusal(fetcher, url, MediaBlockedError)
    assert (network.dialled, resolver.asked) == ([], [])


# Redirects


def redirecting(*locations, status=302):
    """Answers with each location in turn, then with the clip."""
    left = list(locations)

    async def handler(exchange):
        if left:
            await exchange.answer(status, f"Location: {left.pop(0)}\nSet-Cookie: a=b", b"moved")
        else:
            await exchange.answer(200, "", CLIP)

    return handler


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_and_checked_again(status):
    async with serving(redirecting("http://allowed.test/b", "/c", status=status)) as site:
        fetcher, network, resolver = fetcher_for(site)
        assert read(await fetcher.fetch("http://allowed.test/a?secret=1")) == CLIP
        assert [request.split(" ")[1] for request in site.requests] == ["/a?secret=1", "/b", "/c"]
        assert len(network.dialled) == len(resolver.asked)
        for request in site.requests[1:]:
            assert "secret" not in request
            assert "cookie" not in request.lower()


@pytest.mark.parametrize(
    "location",
    [
        "http://internal.test/x",
        "http://127.0.0.1/x",
        "http://[::1]/x",
        "http://0x7f.1/x",
        "//internal.test/x",
        "file:///etc/passwd",
        "ftp://allowed.test/x",
        "http://allowed.test:22/x",
        "http://user@allowed.test/x",
    ],
)
async def test_redirects_to_forbidden_places_are_refused_without_a_hit(location):
    async with serving(redirecting(location)) as site, serving(replying(b"internal")) as internal:
        resolver = FakeResolver(allowed_test=[[PUBLIC]], internal_test=[["10.0.0.1"]])
        routes = {(address, port): internal.port for address in ("10.0.0.1", "127.0.0.1", "::1") for port in (80, 22)}
        fetcher, network, _ = fetcher_for(site, resolver, routes)
        await refusal(fetcher, "http://allowed.test/a", MediaBlockedError)
        assert network.dialled == [(PUBLIC, 80)]
        assert internal.num_connections == 0


async def test_a_name_that_turns_private_between_redirects_is_refused():
    async with serving(redirecting("https://allowed.test/b")) as site:
        resolver = FakeResolver(allowed_test=[[PUBLIC], ["127.0.0.1"]])
        fetcher, network, _ = fetcher_for(site, resolver, {("127.0.0.1", 443): site.port})
        await refusal(fetcher, "http://allowed.test/a", MediaBlockedError)
        assert network.dialled == [(PUBLIC, 80)]


@pytest.mark.parametrize("num_redirects", [2, 11])
async def test_the_number_of_redirects_is_limited(num_redirects):
    async with serving(redirecting(*[f"/{n}" for n in range(num_redirects)])) as site:
        fetcher, _, _ = fetcher_for(site, max_redirects=2)
        if num_redirects == 2:
            assert read(await fetcher.fetch("http://allowed.test/")) == CLIP
        else:
            assert "--max-redirects" in (await refusal(fetcher, "http://allowed.test/")).message
            assert len(site.requests) == 3


async def test_a_redirect_loop_ends():
    async with serving(redirecting(*["http://allowed.test/a"] * 50)) as site:
        fetcher, _, _ = fetcher_for(site)
        await refusal(fetcher, "http://allowed.test/a")
        assert len(site.requests) == 6


async def test_a_redirect_without_a_place_to_go_is_an_error():
    async with serving(replying(b"", status=302)) as site:
        fetcher, _, _ = fetcher_for(site)
        assert "nowhere" in (await refusal(fetcher, "http://allowed.test/")).message


# Answers


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 404, 429, 500, 503])
async def test_other_statuses_are_named(status):
    async with serving(replying(b"secret of the server", status)) as site:
        fetcher, _, _ = fetcher_for(site)
        error = await refusal(fetcher, "http://allowed.test/")
        assert f"HTTP status {status}" in error.message
        assert "secret" not in error.message


async def test_a_length_over_the_limit_is_refused_before_the_body():
    async def handler(exchange):
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")

    async with serving(handler) as site:
        fetcher, _, _ = fetcher_for(site, max_media_bytes=1000)
        error = await refusal(fetcher, "http://allowed.test/", MediaTooLargeError)
        for part in ("10000000000", "1000", "--max-media-bytes"):
            assert part in error.message


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_endless_body_is_cut_off_at_the_limit(chunked):
    num_sent = 0

    async def handler(exchange):
        nonlocal num_sent
        coding = b"Transfer-Encoding: chunked\r\n" if chunked else b"Connection: close\r\n"
        await exchange.send(b"HTTP/1.1 200 OK\r\n" + coding + b"\r\n")
        piece = b"x" * 0x4000
        while True:
            await exchange.send(b"4000\r\n" + piece + b"\r\n" if chunked else piece)
            num_sent += len(piece)

    async with serving(handler) as site:
        fetcher, _, _ = fetcher_for(site, max_media_bytes=100_000)
        await refusal(fetcher, "http://allowed.test/", MediaTooLargeError)
        await asyncio.wait_for(site.disconnected.wait(), 10)
        assert num_sent < 20_000_000


async def test_a_body_at_the_limit_is_accepted():
    async with serving(replying(CLIP)) as site:
        fetcher, _, _ = fetcher_for(site, max_media_bytes=len(CLIP))
        assert read(await fetcher.fetch("http://allowed.test/")) == CLIP
        fetcher, _, _ = fetcher_for(site, max_media_bytes=len(CLIP) - 1)
        await refusal(fetcher, "http://allowed.test/", MediaTooLargeError)


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_compressed_answers_are_refused(encoding):
    async with serving(replying(gzip.compress(bytes(10**6)), headers=f"Content-Encoding: {encoding}")) as site:
        fetcher, _, _ = fetcher_for(site)
        assert "gzip" in (await refusal(fetcher, "http://allowed.test/")).message or encoding == "br"


async def test_web_pages_are_refused():
    async with serving(replying(b"<html>", headers="Content-Type: Text/HTML; charset=utf-8")) as site:
        fetcher, _, _ = fetcher_for(site)
        assert "web page" in (await refusal(fetcher, "http://allowed.test/")).message


async def test_an_empty_answer_is_an_error():
    async with serving(replying(b"")) as site:
        fetcher, _, _ = fetcher_for(site)
        assert "empty" in (await refusal(fetcher, "http://allowed.test/")).message


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.0\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"",
    ],
    ids=["not HTTP", "cut off", "two lengths", "huge header", "bad chunk", "nothing"],
)
async def test_broken_answers_are_errors(answer):
    async def handler(exchange):
        await exchange.send(answer)
        raise ConnectionResetError

    async with serving(handler) as site:
        fetcher, _, _ = fetcher_for(site)
        await refusal(fetcher, "http://allowed.test/")


async def test_unknown_hosts_and_closed_ports_are_errors():
    fetcher, network, _ = fetcher_for(Unreachable())
    assert "resolved" in (await refusal(fetcher, "http://unknown.test/")).message
    assert "connections" in (await refusal(fetcher, "http://allowed.test:81/")).message
    assert network.dialled == [(PUBLIC, 81)]


# Time


@pytest.mark.parametrize("stage", ["header", "body"])
async def test_a_trickling_server_meets_the_deadline(stage):
    async def handler(exchange):
        if stage == "body":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            await exchange.send(b"x")
            await asyncio.sleep(0.01)

    async with serving(handler) as site:
        fetcher, _, _ = fetcher_for(site, fetch_timeout_seconds=0.3)
        error = await refusal(fetcher, "http://allowed.test/")
        assert error.code == "media_fetch_timeout"
        assert "0.3 seconds" in error.message
        assert "--fetch-timeout-seconds" in error.message
        await asyncio.wait_for(site.disconnected.wait(), 10)


async def test_redirects_share_one_deadline():
    async def handler(exchange):
        await asyncio.sleep(0.1)
        await exchange.answer(302, "Location: /again")

    async with serving(handler) as site:
        fetcher, _, _ = fetcher_for(site, fetch_timeout_seconds=0.35, max_redirects=1000)
        assert (await refusal(fetcher, "http://allowed.test/")).code == "media_fetch_timeout"
        assert len(site.requests) <= 4


class StuckResolver:
    async def resolve(self, host):
        await asyncio.sleep(3600)


class StuckNetwork(FakeNetwork):
    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        await asyncio.sleep(3600)


@pytest.mark.parametrize("stuck", ["resolver", "network"])
async def test_connecting_has_a_deadline_that_covers_the_name(stuck):
    resolver = StuckResolver() if stuck == "resolver" else FakeResolver(allowed_test=[[PUBLIC]])
    network = StuckNetwork({}) if stuck == "network" else FakeNetwork({})
    fetcher = Fetcher(MediaConfig(connect_timeout_seconds=0.1), resolver, network=network)
    error = await refusal(fetcher, "http://allowed.test/")
    assert error.code == "media_fetch_timeout"
    assert "--connect-timeout-seconds" in error.message


async def test_a_deadline_does_not_lose_a_cancellation():
    reached = []

    async def work(future):
        async with deadline(10, ValueError()):
            await future
        reached.append("after")
        await asyncio.sleep(0)
        reached.append("never")

    future = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(work(future))
    await asyncio.sleep(0)
    future.set_result(None)  # the work ends and is cancelled in one turn
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert reached == []


async def test_a_deadline_says_what_it_is_told_and_keeps_other_errors():
    async with deadline(10, ValueError()), deadline(None, ValueError()):
        pass
    with pytest.raises(KeyError):
        async with deadline(10, ValueError()):
            raise KeyError
    with pytest.raises(ValueError, match="late"):
        async with deadline(0.01, ValueError("late")):
            await asyncio.sleep(10)
    await asyncio.sleep(0)  # nothing of it hits what comes after


async def test_cancelling_hangs_up_at_once():
    started = asyncio.Event()

    async def handler(exchange):
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nfirst")
        started.set()
        await asyncio.sleep(3600)

    async with serving(handler) as site:
        fetcher, _, _ = fetcher_for(site)
        task = asyncio.create_task(fetcher.fetch("http://allowed.test/"))
        await started.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The site notices only when it writes; the fetcher's side must be closed by now.
        assert not [connection for connection in asyncio.all_tasks() if "_follow" in repr(connection)]


# Large downloads


async def test_large_downloads_go_to_a_file_without_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_module, "MAX_MEMORY_BYTES", 100_000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    body = os.urandom(3_000_000)
    async with serving(replying(body)) as site:
        fetcher, _, _ = fetcher_for(site)
        source = await fetcher.fetch("http://allowed.test/")
    assert isinstance(source, FileSource)
    assert read(source) == body
    assert source.content_hash == BytesSource(body).content_hash
    assert list(tmp_path.iterdir()) == []


async def test_many_fetches_at_once_do_not_mix():
    async def handler(exchange):
        await exchange.answer(200, "", exchange.path.encode() * 1000)

    async with serving(handler) as site:
        fetcher, _, _ = fetcher_for(site)
        sources = await asyncio.gather(*[fetcher.fetch(f"http://allowed.test/{n}") for n in range(20)])
        assert [read(source) for source in sources] == [f"/{n}".encode() * 1000 for n in range(20)]


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Paths of a key and a self-signed certificate for allowed.test."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    options = f"-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout {key} -out {certificate}"
    name = "-subj /CN=allowed.test -addext subjectAltName=DNS:allowed.test"
    subprocess.run(["openssl", "req", *options.split(), *name.split()], check=True, capture_output=True)
    return key, certificate


def tls_server(certificate, names):
    key, chain = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    return context


async def test_tls_is_verified_for_the_name_while_the_checked_address_is_dialled(certificate):
    names = []
    async with serving(replying(CLIP), ssl=tls_server(certificate, names)) as site:
        resolver = FakeResolver(allowed_test=[[PUBLIC]], other_test=[[PUBLIC]])
        trusting = ssl.create_default_context(cafile=certificate[1])
        fetcher, network, _ = fetcher_for(site, resolver, ssl_context=trusting)
        assert read(await fetcher.fetch("https://allowed.test/clip.mp4")) == CLIP
        assert (names, network.dialled) == (["allowed.test"], [(PUBLIC, 443)])
        # The same server under a name that its certificate does not have.
        assert "TLS" in (await refusal(fetcher, "https://other.test/clip.mp4")).message
        assert len(site.requests) == 1


async def test_certificates_of_nobody_known_are_refused(certificate):
    async with serving(replying(CLIP), ssl=tls_server(certificate, [])) as site:
        fetcher, _, _ = fetcher_for(site)
        assert "TLS" in (await refusal(fetcher, "https://allowed.test/clip.mp4")).message
        assert site.requests == []


async def test_https_on_a_plain_server_is_an_error():
    async with serving(replying(CLIP)) as site:
        fetcher, _, _ = fetcher_for(site, connect_timeout_seconds=0.3)
        await refusal(fetcher, "https://allowed.test/clip.mp4")
        assert site.requests == []
