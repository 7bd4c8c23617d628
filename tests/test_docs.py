"""The documents say what is: files they name exist, tables are those of the results, no machine shows through."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_architecture_names_files_that_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z0-9_]+\.py)`", text))
    assert len(named) > 25
    assert not [name for name in named if not (ROOT / "src" / "filmstrip" / name).is_file()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_in_documents_exist(document):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text()))
    known: set[str] = set()
    for command in (["serve"], ["chat"], ["inspect"]):
        help_text = subprocess.run(
            [sys.executable, "-m", "filmstrip.cli.main", *command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        known |= set(re.findall(r"--[a-z][a-z-]+", help_text))
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "src" / "filmstrip" / "demo").glob("*.py")]
    for script in (*scripts, ROOT / "tests" / "fuzz" / "__main__.py"):
        known |= set(re.findall(r"\"(--[a-z][a-z-]+)\"", script.read_text()))
    assert not named - known


def test_the_readme_shows_the_benchmarks_results():
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_results_say_how_they_were_made(path):
    results = json.loads(path.read_text())
    assert {"command", "machine"} <= set(results)
    assert {"cpu", "cores_used"} <= set(results["machine"])
    assert '"torch": "' in path.read_text()
    assert not re.search(r"/(root|home|tmp|work|Users)/", path.read_text())
