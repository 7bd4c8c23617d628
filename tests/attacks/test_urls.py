"""Attack cases A01 to A13: URLs of every kind that must not make the server reach what it should not."""

import pytest

from tests.attacks.harness import MAX_ITEMS, Case, attacks, check_error, question
from tests.attacks.internet import HOST, SECRET
from tests.media.web import PUBLIC

BLOCKED = ("media_blocked",)
SITE = f"http://{HOST}"


def blocked(name, url):
    return Case(name, url, codes=BLOCKED)


NOT_PUBLIC = [
    blocked("A01-loopback", "http://127.0.0.1:CANARY/x.mp4"),
    blocked("A01-loopback-port-80", "http://127.0.0.1/x.mp4"),
    blocked("A01-localhost", "http://localhost:CANARY/x.mp4"),
    blocked("A01-v6", "http://[::1]:CANARY/x.mp4"),
    blocked("A02-metadata", "http://169.254.169.254/latest/meta-data/"),
    blocked("A02-metadata-v6", "http://[fd00:ec2::254]/latest/meta-data/"),
    blocked("A02-metadata-name", "http://metadata.google.internal/computeMetadata/v1/"),
    blocked("A03-10", "http://10.0.0.1/"),
    blocked("A03-172", "http://172.31.255.254/"),
    blocked("A03-192", "https://192.168.1.1/"),
    blocked("A03-cgnat", "http://100.64.0.1/"),
    blocked("A03-unspecified", "http://0.0.0.0:CANARY/"),
    blocked("A03-multicast", "http://224.0.0.1/"),
    blocked("A03-broadcast", "http://255.255.255.255/"),
    blocked("A03-documentation", "http://192.0.2.1/"),
    blocked("A03-benchmark", "http://198.18.0.1/"),
    blocked("A03-platform", "http://168.63.129.16/"),
    blocked("A03-name", "http://private.test/"),
    blocked("A04-decimal", "http://2130706433/"),
    blocked("A04-octal", "http://0177.0.0.1/"),
    blocked("A04-hex", "http://0x7f.1/"),
    blocked("A04-hex-whole", "http://0x7f000001/"),
    blocked("A04-short", "http://127.1/"),
    blocked("A04-trailing-dot", "http://127.0.0.1./"),
    blocked("A04-full-width", "http://１２７.0.0.1/"),
    blocked("A04-circled", "http://①②⑦.⓪.⓪.①/"),
    blocked("A05-mapped", "http://[::ffff:127.0.0.1]/"),
    blocked("A05-mapped-hex", "http://[::ffff:7f00:1]/"),
    blocked("A05-compatible", "http://[::127.0.0.1]/"),
    blocked("A05-nat64", "http://[64:ff9b::7f00:1]/"),
    blocked("A05-nat64-local", "http://[64:ff9b:1::7f00:1]/"),
    blocked("A05-6to4", "http://[2002:7f00:1::]/"),
    blocked("A05-teredo", "http://[2001:0:7f00:1::]/"),
    blocked("A05-scope", "http://[fe80::1%25eth0]/"),
    blocked("A05-unique-local", "http://[fc00::1]/"),
    blocked("A05-mapped-name", "http://mapped.test/"),
    blocked("A05-scoped-name", "http://scoped.test/"),
    blocked("A07-mixed-answers", "http://mixed.test/"),
    blocked("A07-mixed-answers-private-first", "http://mixed-first.test/"),
]


@attacks(NOT_PUBLIC)
def test_addresses_that_are_not_public(server, case, kind, stream):
    server.check_refused(case, kind, stream)
    assert server.internet.network.dialled == []


MISREAD = [
    blocked("A08-backslash-at", f"http://{HOST}\\@127.0.0.1/"),
    blocked("A08-backslash-at-turned", f"http://127.0.0.1\\@{HOST}/"),
    blocked("A08-user", f"http://{HOST}@127.0.0.1/"),
    blocked("A08-user-turned", f"http://127.0.0.1@{HOST}/good.mp4"),
    blocked("A08-password", f"http://u:p@{HOST}/good.mp4"),
    blocked("A08-fragment", f"http://{HOST}#@127.0.0.1/"),
    blocked("A08-query", f"http://{HOST}?@127.0.0.1/"),
    blocked("A08-tab", f"http://{HOST}\t.evil/"),
    blocked("A08-cr-lf", f"http://{HOST}/\r\nHost: 127.0.0.1/"),
    blocked("A08-lf-in-host", "http://127.0.0.1\n.allowed.test/"),
    blocked("A08-space", f"http://{HOST} /good.mp4"),
    blocked("A08-nul", f"http://{HOST}\0.evil/"),
    blocked("A08-percent-nul", f"http://{HOST}%00.evil/"),
    blocked("A08-percent-host", "http://%31%32%37.0.0.1/"),
    blocked("A08-no-host", "http:///good.mp4"),
    blocked("A08-no-slashes", "http:good.mp4"),
    blocked("A08-one-slash", f"http:/{HOST}/good.mp4"),
    blocked("A08-backslashes", f"http:\\\\{HOST}\\good.mp4"),
    blocked("A08-empty-label", "http://allowed..test/"),
    blocked("A08-port-0", f"http://{HOST}:0/good.mp4"),
    blocked("A08-port-65536", f"http://{HOST}:65536/good.mp4"),
    blocked("A08-port-minus", f"http://{HOST}:-80/good.mp4"),
    blocked("A08-port-twice", f"http://{HOST}:80:80/good.mp4"),
    blocked("A08-bracket", f"http://[{HOST}]/good.mp4"),
    blocked("A08-half-bracket", "http://[::1/good.mp4"),
    blocked("A08-zero-width-joiner", "http://allowed\u200d.test/good.mp4"),
    blocked("A08-long", f"{SITE}/{'a' * 20_000}"),
]


@attacks(MISREAD)
def test_urls_that_two_parsers_read_differently(server, case, kind, stream):
    server.check_refused(case, kind, stream)


REDIRECTS = [
    Case("A06-to-loopback", f"{SITE}/to?url=http://127.0.0.1:CANARY/x.mp4", max_hits=1, codes=BLOCKED),
    Case("A06-to-loopback-default-port", f"{SITE}/to?url=http://127.0.0.1/x.mp4", max_hits=1, codes=BLOCKED),
    Case("A06-to-metadata", f"{SITE}/to?url=http://169.254.169.254/&code=307", max_hits=1, codes=BLOCKED),
    Case("A06-to-name", f"{SITE}/to?url=http://private.test/&code=308", max_hits=1, codes=BLOCKED),
    Case("A06-to-localhost", f"{SITE}/to?url=//localhost/x.mp4&code=301", max_hits=1, codes=BLOCKED),
    Case("A06-to-other-port", f"{SITE}/to?url=http://{HOST}:8080/x.mp4", max_hits=1, codes=BLOCKED),
    Case("A06-to-file", f"{SITE}/to?url=file:///etc/passwd", max_hits=1, codes=BLOCKED),
    Case("A06-to-ftp", f"{SITE}/to?url=ftp://{HOST}/x.mp4", max_hits=1, codes=BLOCKED),
    Case("A06-to-data", f"{SITE}/to?url=data:video/mp4;base64,AAAA", max_hits=1, codes=BLOCKED),
    Case("A06-to-user", f"{SITE}/to?url=http://127.0.0.1@{HOST}/x.mp4", max_hits=1, codes=BLOCKED),
    Case("A06-to-mapped", f"{SITE}/to?url=http://[::ffff:127.0.0.1]/x.mp4", max_hits=1, codes=BLOCKED),
    Case("A06-to-decimal", f"{SITE}/to?url=http://2130706433/x.mp4", max_hits=1, codes=BLOCKED),
    Case("A06-11-hops", f"{SITE}/hops?num=11", max_hits=6, codes=("media_fetch_failed",), words="redirects"),
    Case("A06-loop", f"{SITE}/loop", max_hits=6, codes=("media_fetch_failed",), words="redirects"),
]


@attacks(REDIRECTS)
def test_redirects_to_where_no_url_may_lead(server, case, kind, stream):
    server.check_refused(case, kind, stream)
    assert set(server.internet.network.dialled) <= {(PUBLIC, 80)}


SCHEMES = [
    blocked(f"A10-{url.partition(':')[0]}", url)
    for url in (
        f"ftp://{HOST}/x.mp4",
        f"gopher://{HOST}/x.mp4",
        f"dict://{HOST}:11211/stat",
        "javascript:alert(1)",
        f"rtsp://{HOST}/x",
        f"rtmp://{HOST}/x",
        "concat:/etc/passwd|/etc/hosts",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "pipe:0",
        "crypto:/etc/passwd",
        f"srt://{HOST}:9",
        f"udp://{HOST}:9",
        f"tcp://{HOST}:9",
        "s3://bucket/key",
        "blob:null/0",
        "ws://allowed.test/",
        "httpx://allowed.test/",
        "view-source:http://allowed.test/",
    )
] + [
    blocked("A10-upper-case", "HTTP://127.0.0.1:CANARY/x.mp4"),
    Case("A10-data-html", "data:text/html;base64,PGI+"),
    blocked("A10-space-before", " file:///etc/passwd"),
    blocked("A10-lf-before", "\nfile:///etc/passwd"),
]


@attacks(SCHEMES)
def test_schemes_other_than_http(server, case, kind, stream):
    server.check_refused(case, kind, stream)


RESPONSES = [
    Case("A12-huge-length", f"{SITE}/huge-length", max_hits=1, codes=("media_too_large",), words="--max-media-bytes"),
    Case("A12-endless", f"{SITE}/endless", max_hits=1, codes=("media_too_large", "media_fetch_timeout")),
    Case("A12-endless-chunks", f"{SITE}/endless-chunks", max_hits=1, codes=("media_too_large", "media_fetch_timeout")),
    Case(
        "A12-endless-headers",
        f"{SITE}/endless-headers",
        max_hits=1,
        codes=("media_fetch_failed", "media_fetch_timeout"),
    ),
    Case("A12-drip", f"{SITE}/drip", max_hits=1, codes=("media_fetch_timeout",), words="--fetch-timeout-seconds"),
    Case("A12-silence", f"{SITE}/silence", max_hits=1, codes=("media_fetch_timeout",)),
    Case("A12-gzip", f"{SITE}/gzip", max_hits=1, codes=("media_fetch_failed",)),
    Case("A12-html", f"{SITE}/text?type=text/html", max_hits=1, codes=("media_fetch_failed",), words="HTML"),
    Case("A12-404", f"{SITE}/missing", max_hits=1, codes=("media_fetch_failed",), words="404"),
    Case("A12-401", f"{SITE}/status?code=401", max_hits=1, codes=("media_fetch_failed",), words="401"),
    Case("A12-500", f"{SITE}/status?code=500", max_hits=1, codes=("media_fetch_failed",), words="500"),
    Case("A12-204", f"{SITE}/status?code=204", max_hits=1, codes=("media_fetch_failed",)),
    Case("A12-206-unasked", f"{SITE}/status?code=206", max_hits=1),
    Case("A12-cut", f"{SITE}/cut", max_hits=1, codes=("media_fetch_failed",)),
    Case("A12-garbage", f"{SITE}/garbage", max_hits=1, codes=("media_fetch_failed",)),
    Case("A12-empty", f"{SITE}/empty", max_hits=1, codes=("media_fetch_failed",)),
    Case("A12-bad-certificate", f"https://{HOST}/good.mp4", codes=("media_fetch_failed",), words="TLS"),
    Case("A12-unknown-name", "http://nowhere.test/", codes=("media_fetch_failed",)),
    Case("A13-text", f"{SITE}/text", max_hits=1, codes=("media_decode_failed",)),
    Case("A13-text-as-video", f"{SITE}/text?type=video/mp4", max_hits=1, codes=("media_decode_failed",)),
]


@attacks(RESPONSES)
def test_answers_that_a_server_should_not_give(server, case, kind, stream):
    server.check_refused(case, kind, stream)


def ask_for_clip(server, url):
    server.internet.reset()
    return server.post(question(url, "video_url", num_frames=2))


def test_the_good_site_is_reached_by_every_honest_spelling(server):
    """What all refusals above are worth nothing without; and our own request carries nothing of the client's."""
    for url in (f"{SITE}/good.mp4", f"HTTP://{HOST.upper()}/good.mp4?sig=1", f"http://{HOST}.:80/good.mp4#t=1"):
        assert ask_for_clip(server, url).status_code == 200, url
        assert set(server.internet.network.dialled) == {(PUBLIC, 80)}
        for head in server.internet.site.requests:
            assert not {"client-key", "client-cookie", "authorization", "cookie"} & set(head.lower().split())
            assert "client" not in head


def test_redirects_to_public_places_are_followed(server):
    assert ask_for_clip(server, f"{SITE}/hops?num=3").status_code == 200
    assert len(server.internet.site.requests) >= 4


def test_a07_a_name_that_is_rebound_is_never_dialled_at_its_second_address(server):
    assert ask_for_clip(server, "http://rebinding.test/good.mp4").status_code == 200
    assert server.internet.canary.num_connections == 0
    assert set(server.internet.network.dialled) == {(PUBLIC, 80)}
    second = server.post(question("http://rebinding.test/good.mp4?again", "video_url", num_frames=2))
    assert check_error(second)["code"] == "media_blocked"
    assert server.internet.canary.num_connections == 0


def test_a11_proxies_of_the_environment_are_not_used(server, monkeypatch):
    proxy = f"http://127.0.0.1:{server.internet.canary.port}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
        monkeypatch.setenv(name.lower(), proxy)
    assert ask_for_clip(server, f"{SITE}/good.mp4?proxy").status_code == 200
    blocked_answer = server.post(question("http://10.0.0.1/", "video_url"))
    assert check_error(blocked_answer)["code"] == "media_blocked"
    assert server.internet.canary.num_connections == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_too_many_items_are_refused_before_any_is_fetched(server, kind, stream):
    server.internet.reset()
    part = {"type": kind, kind: {"url": f"{SITE}/good.mp4"}}
    answer = server.post([{"role": "user", "content": [part] * (MAX_ITEMS + 1)}], stream=stream)
    assert str(MAX_ITEMS) in check_error(answer)["message"]
    assert server.internet.site.requests == []
    assert server.internet.names.asked == []


@pytest.mark.parametrize("stream", [False, True])
def test_one_blocked_item_among_good_ones_refuses_the_request_only(server, stream):
    server.internet.reset()
    urls = [f"{SITE}/good.mp4", "http://127.0.0.1/", f"{SITE}/good.mp4"]
    content = [{"type": "video_url", "video_url": {"url": url, "num_frames": 2}} for url in urls]
    error = check_error(server.post([{"role": "user", "content": content}], stream=stream))
    assert error["param"] == "messages[0].content[1].video_url.url"
    assert server.internet.canary.num_connections == 0
    server.check_still_good()


def test_a13_nothing_that_was_fetched_is_told(server):
    for path in ("missing", "text", "status?code=500", "to?url=http://10.1.2.3/inner-path"):
        text = ask_for_clip(server, f"{SITE}/{path}").text
        for secret in (SECRET, "inner-path", "10.1.2.3"):
            assert secret not in text


def frames_part(*urls):
    return {
        "type": "video_frames",
        "video_frames": {"frames": [{"url": url, "timestamp": i} for i, url in enumerate(urls)]},
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "urls",
    [
        ["http://127.0.0.1/1.jpg"],
        ["http://10.0.0.1/1.jpg", f"{SITE}/good.mp4"],
        [f"{SITE}/to?url=http://127.0.0.1/1.jpg"],
        ["file:///etc/passwd"],
        ["/etc/passwd", "data:image/png;base64,AAAA"],
        ["ftp://allowed.test/1.jpg"],
        ["http://mixed.test/1.jpg"],
        [f"{SITE}/text", f"{SITE}/text"],
        [f"{SITE}/huge-length"],
        ["data:video/jpeg;base64,AAAA,AAAA"],
    ],
    ids=lambda urls: urls[0][:40],
)
def test_frames_chosen_by_the_client_come_through_the_same_fetcher(server, urls, stream):
    server.internet.reset()
    error = check_error(server.post([{"role": "user", "content": [frames_part(*urls)]}], stream=stream))
    assert error["param"].startswith("messages[0].content[0]")
    assert server.internet.canary.num_connections == 0
    server.check_still_good()


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_frames_are_refused_before_any_is_fetched(server, stream):
    server.internet.reset()
    part = frames_part(*[f"{SITE}/good.mp4"] * 1000)
    check_error(server.post([{"role": "user", "content": [part]}], stream=stream))
    assert server.internet.site.requests == []
    assert server.internet.names.asked == []
