"""A slice of the fuzzing that every run of the tests repeats, and what longer runs have found."""

import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import tests.fuzz.__main__ as command_line
from filmstrip.types import Modality
from tests.fuzz.mutate import MAX_BYTES, mutate
from tests.fuzz.runner import Case, Fuzzer, fuzz, load_seeds, make_case

SEED, NUM_FILES = 3, 3000


@pytest.fixture(scope="module")
def report():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of much of what it is given here
        return fuzz(SEED, 0, NUM_FILES)


@pytest.mark.timeout(280)
def test_damaged_files_give_a_result_or_an_error_and_leave_nothing(report):
    assert report.failures == []
    assert report.num_files == NUM_FILES
    # A slice in which everything, or nothing, got through would test nothing.
    assert NUM_FILES // 20 < report.outcomes["decoded"] < NUM_FILES // 2


def test_no_damaged_file_crashes_the_process_that_decodes_it(report):
    assert report.worker_crashes == []


def test_a_file_can_be_made_again_from_its_number():
    seeds = load_seeds()
    assert [make_case(5, number, seeds) for number in range(200)] == [
        make_case(5, number, seeds) for number in range(200)
    ]
    assert make_case(5, 7, seeds) != make_case(6, 7, seeds)


@pytest.mark.parametrize("name", sorted(load_seeds()))
def test_every_seed_is_damaged_in_many_ways(name):
    seeds = load_seeds()
    rng = random.Random(name)
    damaged = [mutate(seeds[name], rng, list(seeds.values())) for _ in range(300)]
    assert len(set(damaged)) > 250
    assert max(map(len, damaged)) <= MAX_BYTES
    # Edits that keep most of the file: damage that stops every parser at its first check finds nothing.
    assert sum(len(data) >= len(seeds[name]) // 2 for data in damaged) > 150


class Leaky(Fuzzer):
    """A run in which every file does ``leak`` besides."""

    def __init__(self, leak, folder):
        super().__init__(folder, limit_seconds=5.0)
        self.leak = leak

    async def _load(self, loader, case):
        await super()._load(loader, case)
        if case.number >= 0:
            self.leak()


async def test_a_leak_of_descriptors_and_files_is_noticed(tmp_path):
    held = []

    def leak():
        held.append((tmp_path / f"left-{len(held)}").open("w"))

    report = await Leaky(leak, tmp_path).run([Case(0, "rgb.png", Modality.IMAGE, "data", load_seeds()["rgb.png"])])
    for file in held:
        file.close()
    assert any("fds" in failure for failure in report.failures)
    assert any("files" in failure for failure in report.failures)


async def test_an_exception_that_is_none_of_ours_is_a_failure(tmp_path):
    def leak():
        raise ZeroDivisionError("as if by a decoder")

    report = await Leaky(leak, tmp_path).run([Case(0, "rgb.png", Modality.IMAGE, "data", load_seeds()["rgb.png"])])
    assert [failure.partition(":")[0] for failure in report.failures] == ["unexpected"]
    assert "file 0 (rgb.png as image, data)" in report.failures[0]


def test_a_crash_of_the_whole_run_names_the_files_and_the_run_goes_on_behind_them(monkeypatch, capsys):
    started = []

    def run_child(arguments, first, num_files, seconds, log):
        started.append((first, num_files))
        if first > 0:
            return 0, {"outcomes": {"decoded": num_files}, "failures": [], "worker_crashes": []}
        log.write_text("begin 0\nbegin 1\nbegin 2\nend 1 decoded\nbegin 3\nend 0 decoded\n")
        return -signal.SIGSEGV, None

    monkeypatch.setattr(command_line, "_run_child", run_child)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--num-files", "100", "--seed", "9"])
    assert command_line.main() == 1
    assert started == [(0, 100), (4, 96)]
    told = capsys.readouterr().out
    assert "CRASH seed 9: SIGSEGV while files [2, 3] were under way" in told
    assert told.endswith("1 crashes of the whole process, 0 other failures\n")


def test_the_command_line_sends_files_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--num-files", "12", "--seed", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-2000:]
    assert "files 0 to 11 of seed 2" in result.stdout
    saved = tmp_path / "case"
    subprocess.run(
        [*command, "--first", "5", "--save", str(saved)], check=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert saved.read_bytes() == make_case(2, 5, load_seeds()).data
