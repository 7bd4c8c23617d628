"""An inspection to one HTML file that needs nothing else: facts in a table, frames with their times; opens nothing."""

from __future__ import annotations

from html import escape

from filmstrip.media.contact_sheet import jpeg_url
from filmstrip.processing.inspection import Inspection

_STYLE = """
:root { color-scheme: light dark; --ink: #191c21; --muted: #57606c; --line: #d4d8df; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eceef2; --muted: #a7afbb; --line: #343a45; --paper: #15181d; }
}
body { max-width: 80rem; margin: 2rem auto; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
th { padding-right: 1.5rem; text-align: left; vertical-align: top; color: var(--muted); font-weight: 500; }
ol { display: flex; flex-wrap: wrap; gap: 0.75rem; padding: 0; list-style: none; }
figure { margin: 0; }
img { display: block; max-width: 100%; border: 1px solid var(--line); border-radius: 4px; }
figcaption { color: var(--muted); font-size: 0.875rem; font-variant-numeric: tabular-nums; }
""".strip()


def render_page(found: Inspection, name: str, facts: list[tuple[str, str]]) -> str:
    """The page; ``facts`` are pairs of a word and a text. Everything that came with the file is escaped."""
    rows = "\n".join(f"<tr><th scope=row>{escape(word)}</th><td>{escape(text)}</td></tr>" for word, text in facts)
    frames = "\n".join(_frame(url, alt, caption) for url, alt, caption in _frames(found, name))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(name)}: what a model would see</title>
<style>
{_STYLE}
</style>
</head>
<body>
<h1>{escape(name)}: what a model would see</h1>
<table>
{rows}
</table>
<ol>
{frames}
</ol>
</body>
</html>
"""


def _frames(found: Inspection, name: str) -> list[tuple[str, str, str]]:
    """Address, text for who cannot see it, and caption of each picture."""
    thumbnails = found.thumbnails
    assert thumbnails is not None
    urls = [jpeg_url(frame) for frame in thumbnails.frames]
    if not thumbnails.frame_indices:
        return [(urls[0], name, "")]
    return [
        (url, f"frame {index}, at {seconds:.3f} s", f"frame {index}, {seconds:.3f} s")
        for url, index, seconds in zip(urls, thumbnails.frame_indices, thumbnails.timestamps, strict=True)
    ]


def _frame(url: str, alt: str, caption: str) -> str:
    return f'<li><figure><img src="{url}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure></li>'
