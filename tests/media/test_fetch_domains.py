"""The allow-list of hosts: attack cases A06, A08 and A09, with no name asked for and nothing dialled."""

import pytest

from filmstrip.config import MediaConfig
from filmstrip.errors import InvalidRequestError, MediaBlockedError
from filmstrip.media.fetch import Fetcher
from tests.media.web import OTHER_PUBLIC, PUBLIC, FakeNetwork, FakeResolver, ServedFile, replying, serving

CLIP = b"a clip" * 100
DOMAINS = ("allowed.test", "bücher.example", "2606:4700::1111", PUBLIC)


class AnyName:
    """Every name has a public address."""

    def __init__(self):
        self.asked = []

    async def resolve(self, host):
        self.asked.append(host)
        return [PUBLIC]


def fetcher_for(port=1, domains=DOMAINS, **config):
    resolver = AnyName()
    addresses = (PUBLIC, "2606:4700::1111")
    network = FakeNetwork({(address, number): port for address in addresses for number in (80, 8080)})
    config = MediaConfig(allowed_media_domains=domains, fetch_timeout_seconds=20.0, **config)
    return Fetcher(config, resolver, network=network), network, resolver


def read(source):
    with source.open() as file:
        return file.read()


@pytest.mark.parametrize(
    "url",
    [
        "http://allowed.test/x",
        "http://ALLOWED.Test./x",
        "http://allowed.test:8080/x",
        "http://xn--bcher-kva.example/x",
        "http://BÜCHER.example/x",
        "http://[2606:4700:0:0::1111]/x",
        f"http://{PUBLIC}/x",
        "http://ａllowed.test/x",  # full-width: every resolver's rules make it the same name
    ],
)
async def test_allowed_hosts_in_any_spelling_are_fetched_from(url):
    async with serving(replying(CLIP)) as site:
        fetcher, _, _ = fetcher_for(site.port)
        assert read(await fetcher.fetch(url)) == CLIP


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test/",
        "http://allowed.test.evil.com/",
        "http://evilallowed.test/",
        "http://evil-allowed.test/",
        "http://sub.allowed.test/",
        "http://allowed.tes/",
        "http://allowed.test.test/",
        "http://test/",
        "http://evil.test/allowed.test",
        "http://evil.test/?http://allowed.test/",
        "http://evil.test#allowed.test",
        "http://evil.test#@allowed.test/",
        "http://allowed.test@evil.test/",
        "http://evil.test@allowed.test/",
        "http://allowed.test:80@evil.test/",
        "http://allowed.test\\@evil.test/",
        "http://evil.test\\@allowed.test/",
        "http://allowed.test%2eevil.test/",
        "http://allowed.test%00.evil.test/",
        "http://allowed.test\t.evil.test/",
        "http://аllowed.test/",  # a Cyrillic letter
        "http://allоwed.test/",
        "http://xn--llowed-2nf.test/",
        "http://allowed.test..evil.test/",
        "http://bucher.example/",
        "http://xn--bcher-kvb.example/",
        "http://8.8.8.8/",
        f"http://{PUBLIC}0/",
        "http://[2606:4700::1112]/",
        f"http://[::ffff:{PUBLIC}]/",
        "http://127.0.0.1/",
        "http://1572395042/",  # the allowed address as one number
    ],
)
async def test_every_other_host_is_refused_before_its_name_is_asked_for(url):
    fetcher, network, resolver = fetcher_for()
    with pytest.raises(MediaBlockedError) as caught:
        await fetcher.fetch(url, param="messages[0]")
    assert (network.dialled, resolver.asked) == ([], [])
    assert caught.value.param == "messages[0]"
    for secret in (*DOMAINS, "Traceback"):
        assert secret not in caught.value.message


async def test_the_refusal_names_the_option():
    fetcher, _, _ = fetcher_for()
    with pytest.raises(MediaBlockedError, match="--allowed-media-domains"):
        await fetcher.fetch("http://other.test/")


@pytest.mark.parametrize(
    "location",
    [
        "http://evil.test/x",
        "//evil.test/x",
        "http://allowed.test.evil.com/",
        "http://аllowed.test/",
        "http://8.8.8.8/",
        "https://user@allowed.test/",
        "http://allowed.test:22/x",
        "file:///etc/passwd",
        "ftp://allowed.test/x",
    ],
)
async def test_redirects_do_not_lead_out_of_the_allowed_hosts(location):
    async with serving(replying(b"", 302, f"Location: {location}")) as site:
        fetcher, network, resolver = fetcher_for(site.port)
        with pytest.raises(MediaBlockedError):
            await fetcher.fetch("http://allowed.test/")
        assert (network.dialled, resolver.asked, len(site.requests)) == ([(PUBLIC, 80)], ["allowed.test"], 1)


async def test_allowed_hosts_must_be_public_all_the_same():
    network = FakeNetwork({})
    resolver = FakeResolver(allowed_test=[["10.0.0.1"]], other_test=[[OTHER_PUBLIC]])
    config = MediaConfig(allowed_media_domains=("allowed.test", "127.0.0.1"))
    fetcher = Fetcher(config, resolver, network=network)
    for url in ("http://allowed.test/", "http://127.0.0.1/"):
        with pytest.raises(MediaBlockedError, match="public internet"):
            await fetcher.fetch(url)
    assert network.dialled == []


async def test_what_is_kept_is_not_given_to_who_may_not_have_it():
    # Two fetchers never share what they keep; one fetcher applies its policy before it looks into its cache.
    async with serving(ServedFile(CLIP, headers="Cache-Control: max-age=60")) as site:
        fetcher, _, _ = fetcher_for(site.port)
        await fetcher.fetch("http://allowed.test/x")
        await fetcher.fetch("http://allowed.test/x")
        assert fetcher.stats.num_fresh == 1
        for url in ("http://evil.test/x", "http://allowed.test@evil.test/x"):
            with pytest.raises(MediaBlockedError):
                await fetcher.fetch(url)


@pytest.mark.parametrize(
    "domain",
    [
        "",
        "*.allowed.test",
        "http://allowed.test",
        "allowed.test:80",
        "allowed.test/x",
        "u@allowed.test",
        "0x7f.1",
        "[::1",
        "a b",
    ],
)
def test_a_list_with_anything_but_hosts_is_an_error(domain):
    with pytest.raises(InvalidRequestError, match="--allowed-media-domains") as caught:
        Fetcher(MediaConfig(allowed_media_domains=("allowed.test", domain)))
    assert caught.value.param == "allowed_media_domains"
