"""Command line of the fuzzer: runs files in a process of its own and says which file killed it, if one did.

python -m tests.fuzz --num-files 10000 --seed 1            a whole run
python -m tests.fuzz --seed 1 --first 1234 --num-files 1   one file of it again
python -m tests.fuzz --seed 1 --first 1234 --save FILE     write that file instead of sending it
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.fuzz.runner import NUM_AT_ONCE, fuzz, load_seeds, make_case

MAX_CRASHES = 20


def main() -> int:
    """Exit status 0 if every file gave a result or a FilmstripError and nothing was left behind."""
    arguments = _parse()
    if arguments.save is not None:
        arguments.save.write_bytes(make_case(arguments.seed, arguments.first, load_seeds()).data)
        return 0
    if arguments.log is not None:
        return _run_here(arguments)
    return _supervise(arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Send damaged files through the media path."
    )
    parser.add_argument("--num-files", type=int, default=10_000, help="files to send")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no file after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--limit-seconds", type=float, default=30.0, help="longest time for one file")
    parser.add_argument("--save", type=Path, help="write file number FIRST here and send nothing")
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)  # set for the process that does the work
    return parser.parse_args()


def _run_here(arguments: argparse.Namespace) -> int:
    """Send the files from this process, telling the log before and after each."""
    faulthandler.enable()
    warnings.simplefilter("ignore")  # Pillow warns of much of what it is given here
    with arguments.log.open("a", buffering=1) as log:
        report = fuzz(
            arguments.seed,
            arguments.first,
            arguments.num_files,
            seconds=arguments.seconds,
            limit_seconds=arguments.limit_seconds,
            log=lambda line: print(line, file=log),
        )
    print(json.dumps(vars(report)))
    return 1 if report.failures else 0


def _supervise(arguments: argparse.Namespace) -> int:
    """Run the files in child processes: a new one after each crash, from the file after the last one begun."""
    first, end, deadline = arguments.first, arguments.first + arguments.num_files, time.monotonic() + arguments.seconds
    num_crashes = num_failures = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-log-") as folder:
        while first < end and num_crashes < MAX_CRASHES and (first == arguments.first or time.monotonic() < deadline):
            log = Path(folder) / f"{first}.log"
            code, report = _run_child(arguments, first, end - first, deadline - time.monotonic(), log)
            if report is not None:
                print(f"files {first} to {end - 1} of seed {arguments.seed}: {report['outcomes']}")
                num_failures += len(report["failures"])
                for text in report["worker_crashes"]:
                    print(f"worker crashed, seed {arguments.seed}: {text}")
                for text in report["failures"]:
                    print(f"FAILURE seed {arguments.seed}: {text}")
                break
            if code >= 0:
                raise SystemExit(f"the run ended with exit status {code} and no report")
            num_crashes += 1
            begun, unfinished = _read_log(log)
            print(
                f"CRASH seed {arguments.seed}: {signal.Signals(-code).name} while files {unfinished} were under way;"
                f" again with --seed {arguments.seed} --first N --num-files 1"
            )
            first = max(begun, default=first + NUM_AT_ONCE) + 1
    print(f"{num_crashes} crashes of the whole process, {num_failures} other failures")
    return 1 if num_crashes or num_failures else 0


def _run_child(
    arguments: argparse.Namespace, first: int, num_files: int, seconds: float, log: Path
) -> tuple[int, dict | None]:
    """The child's exit code and report; None if it did not live to give one."""
    command = [sys.executable, "-m", "tests.fuzz", "--log", str(log), "--seed", str(arguments.seed)]
    command += ["--first", str(first), "--num-files", str(num_files), "--seconds", str(seconds)]
    command += ["--limit-seconds", str(arguments.limit_seconds)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=os.environ)
    lines = child.stdout.splitlines()
    return child.returncode, json.loads(lines[-1]) if lines and child.returncode in (0, 1) else None


def _read_log(log: Path) -> tuple[list[int], list[int]]:
    """Numbers of the files that were begun, and of those that were not ended."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    begun = [int(words[1]) for words in lines if words[0] == "begin"]
    ended = {int(words[1]) for words in lines if words[0] == "end"}
    return begun, [number for number in begun if number not in ended]


if __name__ == "__main__":
    sys.exit(main())
