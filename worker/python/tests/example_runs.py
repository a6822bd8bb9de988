"""What worker processes do of the examples."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def train(_rank: int, cache: str, name: str, arguments: list[str]) -> dict[str, float]:
    """A worker's part of an example; the first one's result."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    os.environ["ARC_DATA_CACHE"] = cache
    example, training = importlib.import_module(name), importlib.import_module("training")
    args = example.arguments().parse_args(arguments)
    torch.manual_seed(args.seed)
    task = example.TASK(args)
    net = task.model()
    result = training.train(args, example.TASK)
    return {
        **result.validation,
        "untrained": task.validate(net)["loss"],
        "elements": sum(parameter.numel() for parameter in net.parameters()),
        "bytes": result.bytes,
        "bytes_per_step": result.bytes_per_step,
    }
