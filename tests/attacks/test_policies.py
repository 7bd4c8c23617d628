"""Attack cases A09 and A20 on a server that opens no folder and downloads from two names only."""

import pytest

from tests.attacks.harness import AttackedServer, Case, attacks, check_error, question
from tests.attacks.internet import HOST

BLOCKED = ("media_blocked",)


@pytest.fixture(scope="module")
def strict_server(qwen3_vl_dir, clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict-tls")
    domains = ("Allowed.Test", "bücher.test")
    with AttackedServer(qwen3_vl_dir, None, clip, folder, allowed_media_domains=domains) as server:
        yield server


def blocked(name, url, **more):
    return Case(name, url, codes=BLOCKED, **more)


OTHERS = [
    blocked("A09-suffix", "http://allowed.test.evil.com/good.mp4"),
    blocked("A09-prefix", "http://evilallowed.test/good.mp4"),
    blocked("A09-below", "http://evil.allowed.test/good.mp4"),
    blocked("A09-above", "http://test/good.mp4"),
    blocked("A09-homograph", "http://аllowed.test/good.mp4"),
    blocked("A09-homograph-punycode", "http://xn--llowed-7ve.test/good.mp4"),
    blocked("A09-user", f"http://{HOST}@evilallowed.test/good.mp4"),
    blocked("A09-user-turned", f"http://evilallowed.test@{HOST}/good.mp4"),
    blocked("A09-backslash", f"http://evilallowed.test\\.{HOST}/good.mp4"),
    blocked("A09-fragment", f"http://evilallowed.test#.{HOST}/good.mp4"),
    blocked("A09-query", f"http://evilallowed.test?.{HOST}/good.mp4"),
    blocked("A09-nul", "http://allowed.test%00.evil.com/good.mp4"),
    blocked("A09-two-dots", f"http://{HOST}../good.mp4"),
    blocked("A09-address", "http://93.184.216.34/good.mp4"),
    blocked("A09-no-host", "http:///good.mp4"),
    blocked("A09-redirect", f"http://{HOST}/to?url=http://evilallowed.test/good.mp4", max_hits=1),
    blocked("A09-redirect-to-address", f"http://{HOST}/to?url=http://93.184.216.34/good.mp4", max_hits=1),
    blocked("A09-redirect-to-loopback", f"http://{HOST}/to?url=http://127.0.0.1/good.mp4", max_hits=1),
]


@attacks(OTHERS)
def test_a09_only_the_exact_host_passes(strict_server, case, kind, stream):
    strict_server.check_refused(case, kind, stream)
    assert set(strict_server.internet.names.asked) <= {HOST}


def test_a09_an_allowed_name_does_not_make_an_address_public(strict_server, monkeypatch):
    monkeypatch.setitem(strict_server.internet.table, HOST, ["10.0.0.7"])
    strict_server.internet.reset()
    answer = strict_server.post(question(f"http://{HOST}/good.mp4", "video_url"))
    assert check_error(answer)["code"] == "media_blocked"
    assert strict_server.internet.network.dialled == []


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/good.mp4",
        "http://ALLOWED.test./good.mp4?dot",
        f"http://{HOST}:80/good.mp4?port",
        "http://bücher.test/good.mp4",
        "http://xn--bcher-kva.test/good.mp4?punycode",
        "http://BÜCHER.test/good.mp4?upper",
        f"http://{HOST}/to?url=http://bücher.test/good.mp4",
    ],
)
def test_a09_the_same_host_in_other_letters_passes(strict_server, url):
    strict_server.internet.reset()
    answer = strict_server.post(question(url, "video_url", num_frames=2))
    assert answer.status_code == 200, answer.text


@attacks(
    [
        blocked("A20-url", "file:///etc/passwd"),
        blocked("A20-path", "/etc/passwd"),
        blocked("A20-dots", "../../etc/passwd"),
        blocked("A20-relative", "clip.mp4"),
        blocked("A20-here", "."),
        blocked("A20-root", "/"),
        blocked("A20-missing", "/no/such/file"),
        blocked("A20-home", "~"),
        blocked("A20-upper", "FILE:///etc/passwd"),
        blocked("A20-no-slashes", "file:/etc/passwd"),
        blocked("A20-localhost", "file://localhost/etc/passwd"),
        blocked("A20-other-host", "file://host/etc/passwd"),
        blocked("A20-encoded", "file:///%65tc/passwd"),
        blocked("A20-zero", "/dev/zero"),
        blocked("A20-fd", "/proc/self/fd/0"),
    ]
)
def test_a20_no_file_is_read_where_no_folder_is_open(strict_server, case, kind, stream):
    strict_server.check_refused(case, kind, stream)


def test_a20_a_closed_server_says_the_same_of_every_path(strict_server):
    paths = ["/etc/passwd", "/no/such/file", "/dev/zero", "/", "x"]
    messages = {check_error(strict_server.post(question(path, "video_url")))["message"] for path in paths}
    assert len(messages) == 1
