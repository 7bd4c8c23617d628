"""``filmstrip models``: which checkpoints can be served, and what they take; loads no weights."""

from __future__ import annotations

import argparse
import json

from filmstrip.processing.registry import supported_models


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each architecture; returns 0."""
    models = {name: ["text", *sorted(modalities)] for name, modalities in supported_models().items()}
    if arguments.json:
        print(json.dumps(models, indent=2))
        return 0
    width = max(map(len, models))
    print(f"{'architecture in config.json':<{width}}  takes")
    for name, modalities in models.items():
        print(f"{name:<{width}}  {', '.join(modalities)}")
    return 0
