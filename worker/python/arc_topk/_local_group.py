"""The processes of one machine, as the process group has them: who they are, and what they say to each other.

Every call is a collective one: all processes of the machine make it, in the same order.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ._native import ConfigError

_BY_HAND = "or pass a process group of this machine's processes, such as torch.distributed.new_subgroups(8)[0]"


@dataclasses.dataclass(frozen=True)
class LocalGroup:
    """The processes of this machine, of which the first one, the leader, speaks with the shards."""

    #: Ranks in the default process group, ascending.
    ranks: tuple[int, ...]
    #: Which of the ``machines`` in the default process group this one is.
    machine: int
    machines: int
    # Process groups of their own, so that nothing that the script does comes between: for words in main memory, and for gradients
    # where they are.
    _words: Any = dataclasses.field(repr=False)
    _values: Any = dataclasses.field(repr=False)

    @classmethod
    def agreed(cls, own: Any) -> LocalGroup:
        """The group that ``own`` means: a process group, a function that makes one, or ``"node"``.

        All processes of the default group call it at once.

        Raises ConfigError, on all of them, where groups differ in size or overlap.
        """
        if isinstance(own, cls):
            return own
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ConfigError("local_group needs a process group: call torch.distributed.init_process_group before")
        told: list[Any] = [None] * torch.distributed.get_world_size()
        try:
            members = _members(own() if callable(own) else own)
        except Exception as error:  # noqa: BLE001 - the others wait for a word
            members = f"local_group: {type(error).__name__}: {error}"
        torch.distributed.all_gather_object(told, members)
        parts = partition(told)
        rank = torch.distributed.get_rank()
        machine = next(at for at, part in enumerate(parts) if rank in part)
        lists = [list(part) for part in parts]
        words, _ = torch.distributed.new_subgroups_by_enumeration(lists, backend="gloo")
        values, _ = torch.distributed.new_subgroups_by_enumeration(lists)
        return cls(parts[machine], machine, len(parts), words, values)

    @property
    def size(self) -> int:
        """Processes of the machine."""
        return len(self.ranks)

    @property
    def leader(self) -> int:
        """Rank of the one that speaks with the shards."""
        return self.ranks[0]

    @property
    def leads(self) -> bool:
        """Whether this process does."""
        return torch.distributed.get_rank() == self.leader

    def gathered(self, word: Any) -> list[Any]:
        """What each process says, in the order of their ranks."""
        words: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(words, word, group=self._words)
        return words

    def tell(self, word: Any) -> None:
        """The leader's call, where the others :meth:`hear`."""
        torch.distributed.broadcast_object_list([word], src=self.leader, group=self._words)

    def hear(self) -> Any:
        """What the leader tells."""
        word: list[Any] = [None]
        torch.distributed.broadcast_object_list(word, src=self.leader, group=self._words)
        return word[0]

    def reduce(self, values: torch.Tensor) -> Any:
        """Begins to bring the mean to the leader, in place; what the others have then is of no use. Returns what to wait for."""
        # Before the sum, which may not fit a narrow type.
        values.div_(self.size)
        if values.device.type == "cpu":
            return torch.distributed.reduce(values, self.leader, group=self._values, async_op=True)
        # Gloo reduces to a single process in main memory alone.
        return torch.distributed.all_reduce(values, group=self._values, async_op=True)

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Brings what the leader has there to all, in place."""
        works = [torch.distributed.broadcast(values, self.leader, group=self._values, async_op=True) for values in tensors]
        for work in works:
            work.wait()


def _members(own: Any) -> tuple[int, ...] | str:
    """Ranks of the local group as this process knows it, or what is wrong, which all are to hear."""
    if own == "node":
        place = [os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        if not all(word.isdecimal() for word in place):
            return f'local_group="node" needs LOCAL_RANK and LOCAL_WORLD_SIZE in the environment: start it by torchrun, {_BY_HAND}'
        first = torch.distributed.get_rank() - int(place[0])
        return tuple(range(first, first + int(place[1])))
    if not isinstance(own, torch.distributed.ProcessGroup):
        return f'local_group is {own!r}: pass "node", {_BY_HAND}'
    return tuple(sorted(torch.distributed.get_process_group_ranks(own)))


def partition(told: Sequence[tuple[int, ...] | str]) -> list[tuple[int, ...]]:
    """The local groups, in the order of their leaders, from what the process of each rank has as its own.

    Raises ConfigError where that is no partition into groups of one size.
    """
    parts: list[tuple[int, ...]] = []
    for rank, own in enumerate(told):
        if isinstance(own, str):
            raise ConfigError(f"process {rank}: {own}")
        if rank not in own or any(other not in range(len(told)) or told[other] != own for other in own):
            raise ConfigError(
                f"process {rank} has the local group {list(own)}, and its processes do not all have the same one: pass each "
                "the process group of its own machine"
            )
        if rank == own[0]:
            parts.append(own)
    sizes = sorted({len(part) for part in parts})
    if len(sizes) > 1:
        raise ConfigError(
            f"machines have {' and '.join(map(str, sizes))} processes: the mean of their means would give processes different "
            "weights. Start as many on every machine (torchrun --nproc-per-node), or register without local_group"
        )
    return parts
