"""Feedback state for another number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._native import ConfigError

_SHARED = "global"
_RESIDUAL = "residual"


def joined_state(template: dict[str, Any], shared: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Feedback arrays of a worker that joins a running job: nothing pending, and estimates that are those of all."""
    arrays = {}
    for name, like in template["arrays"].items():
        kind, _, tensor = name.partition("/")
        arrays[name] = torch.zeros_like(like) if kind == _RESIDUAL else shared[f"{_SHARED}/{tensor}"]
    return arrays


def shared_arrays(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The feedback arrays that are equal on all workers."""
    return {name: values for name, values in state["arrays"].items() if name.startswith(f"{_SHARED}/")}


def merge_states(states: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """What worker ``rank`` of ``world_size`` goes on from, where ``states`` are what all workers of the job before saved.

    Under ef14 the mean pending residual is kept: new worker j takes the sum of those of the old ones i ≡ j (mod M), times M/N.
    Under ef21 and ef21m every worker starts from H, which is the mean of all estimates. With as many workers as before each
    one's state is its own.

    Where the processes of a machine are one worker (``local_group``), give the states of all processes before, in the order of
    their ranks, and as ``rank`` and ``world_size`` the machine's number and the number of machines, on all its processes alike.
    """
    # Of a machine whose processes are one worker, its leader's is there once.
    states = [state for state in states if not state.get("follower")]
    if not states:
        raise ConfigError("there are no states to go on from: give those of all ranks, in their order")
    steps = {(state["step"], state["update"]) for state in states}
    if len(steps) != 1:
        raise ConfigError(f"the states are of different steps ({sorted(steps)}): give those of one step")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} workers")
    old = len(states)
    if old == world_size:
        return states[rank]
    own = [states[index]["arrays"] for index in range(rank, old, world_size)]
    arrays = {}
    for name, like in states[0]["arrays"].items():
        kind, _, tensor = name.partition("/")
        if kind == _SHARED:
            arrays[name] = like
        elif kind == _RESIDUAL:
            total = torch.zeros(like.shape, dtype=torch.float64)
            for one in own:
                total += one[name].double()
            arrays[name] = (total * (world_size / old)).float()
        else:
            arrays[name] = states[0]["arrays"][f"{_SHARED}/{tensor}"]
    return {"step": states[0]["step"], "update": states[0]["update"], "arrays": arrays}
