"""What worker processes do of the examples."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def train(_rank: int, cache: str, name: str, arguments: list[str]) -> dict[str, float]:
    """A worker's part of an example; the first one's result."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    os.environ["ARC_DATA_CACHE"] = cache
    example, training = importlib.import_module(name), importlib.import_module("training")
    result = training.train(example.arguments().parse_args(arguments), example.TASK)
    return {**result.validation, "bytes": result.bytes, "bytes_per_step": result.bytes_per_step}
