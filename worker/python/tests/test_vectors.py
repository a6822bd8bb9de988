"""The golden vectors of the algorithm, through Python, shards and all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs

VECTORS = Path(__file__).parents[3] / "common" / "tests" / "vectors"


def load(name: str) -> Any:
    with gzip.open(VECTORS / f"{name}.gz", "rt") as file:
        return json.load(file)


def assert_close(what: str, actual: torch.Tensor, expected: list[float]) -> None:
    """To 1e-5 of a value or of the root mean square of its array."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert actual.shape == wanted.shape, what
    bound = 1e-5 * torch.maximum(wanted.abs(), wanted.square().mean().sqrt())
    assert bool(((actual.double() - wanted).abs() <= bound).all()), what


@pytest.mark.parametrize("name", load("index.json"))
def test_rounds(shards, workers, name):
    rounds = load(name)
    config = rounds["config"]
    settings = jobs.LOSSLESS | {
        "feedback": config["feedback"],
        "density": config["density"],
        "sketch_rank": config["rank"],
        "seed": int(config["seed"]),
        "eta": config["eta"],
        "init": config["init"],
        "dense_below_elements": config["min_elements"],
        "wire_sketch": "f32",
    }
    world = config["workers"]
    got = workers.run(shards(1, world), world, jobs.vectors, rounds, settings)
    for rank, worker in enumerate(got):
        for step, expected in enumerate(rounds["steps"]):
            for index, tensor in enumerate(expected):
                what = f"step {step}, tensor {index}, worker {rank}"
                assert_close(what, worker["results"][step][index], tensor["result"])
                if not config["feedback"].startswith("ef21"):
                    rows = worker["rows"][step][index]
                    assert (None if rows is None else rows.tolist()) == tensor.get("selected"), what
        check_state(rounds, rank, worker["arrays"])


def check_state(rounds: dict[str, Any], rank: int, arrays: dict[str, torch.Tensor]) -> None:
    compared = 0
    for index, tensor in enumerate(rounds["tensors"]):
        for field in ("residual", "local", "momentum", "global"):
            expected = rounds["state"].get(field)
            saved = arrays.get(f"{field}/{tensor['name']}")
            if expected is None or saved is None:
                continue
            values = expected[index] if field == "global" else expected[rank][index]
            if values is not None:
                assert_close(f"{field}, tensor {index}, worker {rank}", saved, values)
                compared += 1
    assert compared > 0 or rounds["config"]["feedback"] == "none"
