"""Puts the benchmarks' tables into the README: ``python benchmarks/tables.py`` writes, ``--check`` compares.

Each script prints its table from its JSON under ``benchmarks/results`` with ``--table``.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("ingest", "sparse", "load", "chat", "attention")


def filled(readme: str) -> str:
    """``readme`` with every table between its markers as the results have it now."""
    for name in NAMES:
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--table"]
        table = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        readme, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", readme)
        if count != 1:
            raise SystemExit(f"README.md must have the markers of {name} once, not {count} times")
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README does not show the results")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if not arguments.check:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        raise SystemExit("README.md does not show the results; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
