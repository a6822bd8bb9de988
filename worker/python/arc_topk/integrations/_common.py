"""What the integrations share: finding the wrapped model, joining as its process group, states of all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .. import _state
from .._exchange import Exchange
from .._local_group import LocalGroup
from .._merge import merge_states
from .._native import ConfigError
from ..config import Config
from ..ddp import register
from ..optimizer import _warn_of_adam


def wrapped(model: Any) -> nn.Module:
    """The ``DistributedDataParallel`` that a framework made of its model, within ``torch.compile`` too."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "register_comm_hook"):
        raise ConfigError(
            f"the framework made no DistributedDataParallel of the model, but left a {type(model).__name__}: start as many "
            "processes as there are workers (`arc-worker local -- python ...`, or torchrun), and use DDP, not FSDP or DeepSpeed"
        )
    assert isinstance(model, nn.Module)
    return model


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many this is, and which worker of how many."""

    process: int
    processes: int
    worker: int
    workers: int

    @property
    def local_world_size(self) -> int:
        """Processes that are one worker."""
        return self.processes // self.workers

    def of(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What to go on from, where ``states`` are what all processes before saved."""
        return merge_states(states, self.worker, self.workers)


def join(model: nn.Module, config: Config, state: Callable[[Place], Any], local_group: Any, **more: Any) -> Exchange:
    """Registers the hook, as the process group's rank; ``state(place)`` is what to go on from.

    A worker that is in a job still, from training before, leaves it first, and all others with it: a job has one set of tensors.
    """
    import torch.distributed as dist  # noqa: PLC0415 - PyTorch may be built without it

    rank, world = dist.get_rank(), dist.get_world_size()
    if _state._exchange is not None:
        _state.shutdown()
        dist.barrier()
    peers = _state.peers()
    # Some launchers set no RANK or WORLD_SIZE.
    _state._peers = dataclasses.replace(
        peers,
        rank=rank if peers.rank is None else peers.rank,
        world_size=world if peers.world_size is None else peers.world_size,
    )
    group = None if local_group is None else LocalGroup.agreed(local_group)
    place = Place(rank, world, rank, world) if group is None else Place(rank, world, group.machine, group.machines)
    return register(model, config, state=state(place), local_group=group, **more)


def warn_of_adam(optimizer: Any, config: Config) -> None:
    """What :class:`arc_topk.DistributedOptimizer` says of plain Adam, of an optimizer that a framework may have wrapped."""
    _warn_of_adam(getattr(optimizer, "optimizer", optimizer), config)
