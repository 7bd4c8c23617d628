"""How often the demo model is right, by kind of question and by what is taken from the clips.

Clips of seeds that training never saw are encoded to files, a server is started, and questions are asked over HTTP.

    python benchmarks/demo_model.py
    python benchmarks/demo_model.py --table
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import torch
from chat import cpu_model

from filmstrip.demo import bundled
from filmstrip.demo.evaluate import FIRST_SEED, evaluate, evaluate_ablations
from filmstrip.demo.serving import running_server

RESULTS = Path(__file__).parent / "results" / "demo_model.json"
MAX_WRONG_SHOWN = 40
MEANINGS = {
    "compare": "two videos",
    "digit_at": "digit at a time",
    "in turn": "follow-up",
    "picture": "picture alone",
    "picture_and_video": "picture and video",
    "when": "when (within 0.5 s)",
    "where_at": "where at a time",
    "where_edge": "where at first, at last",
}
"""Kinds whose names do not speak for themselves."""


def table(results):
    """Two Markdown tables: right answers by kind, and by what was taken."""
    whole = results["whole"]
    lines = ["| questions | asked | right |", "| --- | ---: | ---: |"]
    lines += [
        f"| {MEANINGS.get(kind, kind)} | {row['asked']} | {row['right']:.1%} |" for kind, row in whole["kinds"].items()
    ]
    lines += [f"| **all** | {whole['asked']} | {whole['right']:.1%} |", ""]
    ablations = results["ablations"]
    kinds = list(ablations["none"]["kinds"])
    lines += [
        "| taken from the clip | " + " | ".join(MEANINGS.get(kind, kind) for kind in kinds) + " |",
        "| --- |" + " ---: |" * len(kinds),
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{rows['kinds'][kind]['right']:.1%}" for kind in kinds) + " |"
        for name, rows in ablations.items()
    ]
    lines += [
        "",
        f"{results['num_clips']} clips, and {results['num_ablation_clips']} to take from ("
        + ", ".join(f"{row['asked']} {MEANINGS.get(kind, kind)}" for kind, row in ablations["none"]["kinds"].items())
        + f"); seeds from {results['first_seed']:,}. `{results['command']}`",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=bundled.MODEL, help="checkpoint to serve (default: the bundled one)"
    )
    parser.add_argument("--num-clips", type=int, default=500)
    parser.add_argument("--num-ablation-clips", type=int, default=200)
    parser.add_argument(
        "--questions-per-clip", type=int, default=4, help="besides those in turn, of two and of pictures"
    )
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    with tempfile.TemporaryDirectory(prefix="filmstrip-evaluate-") as name:
        folder = Path(name)
        with running_server(str(arguments.model), folder) as server:
            whole = evaluate(
                *(server.url, folder),
                num_clips=arguments.num_clips,
                questions_per_clip=arguments.questions_per_clip,
                first_seed=arguments.first_seed,
            )
            ablations = evaluate_ablations(
                server.url, folder, num_clips=arguments.num_ablation_clips, first_seed=arguments.first_seed
            )
    results = {
        "command": "python benchmarks/demo_model.py"
        + ("" if arguments.model == bundled.MODEL else f" --model {arguments.model.name}"),
        "machine": {"cpu": cpu_model(), "cores_used": len(os.sched_getaffinity(0)), "system": platform.system()},
        "versions": {"torch": torch.__version__},
        "num_clips": arguments.num_clips,
        "num_ablation_clips": arguments.num_ablation_clips,
        "first_seed": arguments.first_seed,
        "whole": whole.summary(),
        "ablations": {name: ablated.summary() for name, ablated in ablations.items()},
        "some_wrong": whole.wrong[:MAX_WRONG_SHOWN],
    }
    print(table(results))
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
