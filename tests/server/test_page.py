"""The page's files: types, caching, a policy that leaves no way in, and colours that can be read; no browser."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import filmstrip.server
from filmstrip.server.page import PATHS
from tests.server.fakes import FakeLLM, asgi_client
from tests.server.test_chat import MESSAGES
from tests.server.test_errors import error_of

STATIC = Path(filmstrip.server.__file__).parent / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Markup(HTMLParser):
    """Elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.scripts.append(data)


@pytest.fixture(scope="module")
def markup():
    return Markup((STATIC / "index.html").read_text())


@pytest.mark.parametrize("path", sorted(PATHS))
async def test_files_with_their_headers(path):
    name = "index.html" if path == "/" else path.removeprefix("/page/")
    async with asgi_client(FakeLLM()) as client:
        response = await client.get(path)
        head = await client.head(path)
        known = await client.get(path, headers={"If-None-Match": response.headers["etag"]})
        weak = await client.get(path, headers={"If-None-Match": f'"other", W/{response.headers["etag"]}'})
        other = await client.get(path, headers={"If-None-Match": '"other"'})
    assert response.content == (STATIC / name).read_bytes()
    assert response.headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix]
    assert (response.headers["x-content-type-options"], response.headers["cache-control"]) == ("nosniff", "no-cache")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(response.content))
    assert [(each.status_code, each.content) for each in (known, weak)] == [(304, b"")] * 2
    assert other.content == response.content
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}


def test_all_files_are_served():
    assert {f"/page/{path.name}" for path in STATIC.iterdir()} - {"/page/index.html"} | {"/"} == PATHS


async def test_nothing_else_is_served():
    async with asgi_client(FakeLLM()) as client:
        for path in (
            "/page",
            "/page/",
            "/page/index.html",
            "/page/../page.py",
            "/page/%2e%2e/page.py",
            "/static/app.js",
        ):
            assert (await client.get(path)).status_code == 404
        assert (await client.post("/")).status_code == 405


async def test_the_page_is_open_and_the_api_is_not():
    async with asgi_client(FakeLLM(), api_key="secret") as client:
        for path in PATHS:
            assert (await client.get(path)).status_code == 200
        for path in ("/v1/models", "/page/other.js", "/page"):
            assert (await client.get(path)).status_code == 401
        answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert error_of(answer)["code"] == "invalid_api_key"


async def test_the_page_can_be_left_out():
    async with asgi_client(FakeLLM(), page=False) as client:
        for path in PATHS:
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/v1/models")).status_code == 200


async def test_the_page_checks_the_host():
    async with asgi_client(FakeLLM()) as client:
        assert (await client.get("/", headers={"host": "evil.example"})).status_code == 403


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(markup):
    assert not markup.scripts
    for _, attributes in markup.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            address = attributes.get(name) or ""
            assert not re.match(r"(\w+:|//|/)", address)
            if address and not address.startswith("#"):
                assert f"/{address}" in PATHS
    for path in [*SCRIPTS, STATIC / "style.css"]:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # the name of a language, not an address
        assert not re.search(r"(https?:)?//(?! )\w", text.replace("https://…", ""))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_text_never_becomes_markup_or_program(path):
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|createContextualFragment|srcdoc"
    )
    assert not re.search(sinks, path.read_text())
    for name in re.findall(r'from "\./(\w+\.js)"', path.read_text()):
        assert (STATIC / name).is_file()


def test_everything_that_is_filled_in_has_a_name(markup):
    ids = [attributes["id"] for _, attributes in markup.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    labelled = {attributes.get("for") for tag, attributes in markup.elements if tag == "label"}
    for tag, attributes in markup.elements:
        # Fields of a card get their ids, and labels theirs, when it is made; a check box stands inside its label.
        if tag in ("input", "select", "textarea") and attributes.get("id") not in (None, "fit"):
            assert attributes["id"] in labelled
        for name in ("aria-labelledby", "aria-controls", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        if tag == "img":
            assert "alt" in attributes
    used = {name for path in SCRIPTS for name in re.findall(r'byId\("([\w-]+)"\)', path.read_text())}
    assert used <= set(ids)


def colours(scheme: str) -> dict[str, str]:
    light, dark = re.findall(r":root \{(.*?)\}", (STATIC / "style.css").read_text(), re.DOTALL)[:2]
    found = dict(re.findall(r"--([\w-]+): (#\w{6});", light))
    return found | (dict(re.findall(r"--([\w-]+): (#\w{6});", dark)) if scheme == "dark" else {})


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "paper", "least"),
    [
        *((ink, paper, 4.5) for ink in ("ink", "muted", "accent") for paper in ("background", "panel", "soft")),
        *(("error", paper, 4.5) for paper in ("error-soft", "panel", "background")),
        ("on-accent", "accent", 4.5),
        ("cached", "cached-soft", 4.5),
        ("field-line", "panel", 3.0),
        ("accent", "line", 3.0),
    ],
)
def test_contrast_is_enough(scheme, ink, paper, least):
    """WCAG 2.2 AA: 4.5 for text, 3 for the borders of fields and for marks."""
    found = colours(scheme)
    low, high = sorted((luminance(found[ink]), luminance(found[paper])))
    assert (high + 0.05) / (low + 0.05) >= least
