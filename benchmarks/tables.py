"""Puts the benchmarks' tables into the documents: ``python benchmarks/tables.py`` writes, ``--check`` compares.

Each script prints its table from its JSON under ``benchmarks/results`` with ``--table``.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = {
    "README.md": ("ingest", "sparse", "load", "chat", "attention"),
    "docs/demo-model.md": ("demo_model",),
}
"""Documents, and the scripts whose tables they show."""


def filled(document: str, text: str, names: tuple[str, ...]) -> str:
    """``text`` of ``document`` with every table between its markers as the results have it now."""
    for name in names:
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--table"]
        table = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"{document} must have the markers of {name} once, not {count} times")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the documents do not show the results")
    arguments = parser.parse_args()
    for document, names in TABLES.items():
        path = ROOT / document
        old = path.read_text(encoding="utf-8")
        new = filled(document, old, names)
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            raise SystemExit(f"{document} does not show the results; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
