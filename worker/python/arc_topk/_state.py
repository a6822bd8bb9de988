"""What the process has told arc_topk, and the exchange that it has open."""

from __future__ import annotations

import atexit
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from . import _native
from ._exchange import Exchange, Summary
from .config import Config, Peers, whole

_peers: Peers | None = None
# Rank and number of workers as :func:`init` was told them.
_asked: tuple[int | None, int | None] = (None, None)
_exchange: Exchange | None = None
# The handler of SIGTERM that stands while there is an exchange.
_end: Any | None = None


def init(
    shards: str | list[str] | tuple[str, ...] | None = None,
    *,
    certs: str | os.PathLike[str] | None = None,
    job: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    **timeouts: float,
) -> None:
    """Says where the shards are. What is not given comes from the environment; see :class:`Peers`.

    Nothing is connected yet: a worker joins its job when the tensors are known. Without a call the environment decides.
    """
    global _peers, _asked
    _asked = (rank, world_size)
    _peers = Peers.find(shards, certs, job, rank, world_size, **timeouts)


def peers() -> Peers:
    """Where the shards are: as :func:`init` said, else as the environment says now."""
    return Peers.find() if _peers is None else _peers


def open_exchange(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Config,
    *,
    trainer: str = "",
    state: Mapping[str, Any] | None = None,
    elastic: bool = False,
    gradients: bool = True,
    beside: bool = False,
    machine: tuple[int, int] | None = None,
) -> Exchange:
    """Joins the job with these tensors. A process is one worker, and has one exchange at a time.

    ``gradients``: what is exchanged is the gradients of these tensors, so that optimizers may ask which of their rows came.
    ``beside``: there is a process group, which could average them as well.
    ``machine``: the process speaks for all of its machine, which is this one of so many.
    """
    if config.mode == "auto" and not beside:
        raise _native.ConfigError(
            'mode is "auto", which compares the shards with a process group: it is for arc_topk.register(model) with a '
            "DistributedDataParallel model; leave it out here"
        )

    def join() -> Exchange:
        where = peers() if machine is None else _as_machine(peers(), *machine)
        joined = Exchange(tensors, config, where, trainer=trainer, state=state, elastic=elastic)
        joined.carries_gradients = gradients
        return joined

    return enter(join)


def _as_machine(known: Peers, machine: int, machines: int) -> Peers:
    """Rank and number of workers where machines are workers. Those of torchrun, which counts processes, do not count.

    Machines that have a process group each do not know of each other there: then ``ARC_RANK`` and ``ARC_WORKERS`` say it.
    """
    rank = whole("rank", os.environ.get("ARC_RANK") or None) if _asked[0] is None else _asked[0]
    workers = whole("world_size", os.environ.get("ARC_WORKERS") or None) if _asked[1] is None else _asked[1]
    if machines > 1 and workers not in (None, machines):
        raise _native.ConfigError(
            f"arc_topk.init or ARC_WORKERS says {workers} workers, and the process group has {machines} machines, each of which is "
            "one worker with local_group: leave it out, ARC_RANK too"
        )
    return dataclasses.replace(known, rank=machine if rank is None else rank, world_size=machines if workers is None else workers)


def enter(join: Callable[[], Exchange]) -> Exchange:
    """Makes what this joins with the process's exchange, of which it has one at a time."""
    global _exchange
    if _exchange is not None:
        raise _native.ConfigError(
            "this process is a member of a job already, with the tensors of the model that was registered or wrapped: do that "
            "once; call arc_topk.shutdown() before it joins with others"
        )
    _leave_when_asked_to_end()
    _exchange = join()
    return _exchange


def _leave_when_asked_to_end() -> None:
    """Lets SIGTERM end the script as ``sys.exit(143)`` would, and so leave its job in order, unless it has a handler of its own.

    As the first process of a container Python would not hear it at all. Elsewhere it ends a process at once, also one that
    waits in native code, where no handler of Python's runs; there this is asked for by ``ARC_LEAVE_ON_SIGTERM=1``.
    """
    if os.getpid() != 1 and os.environ.get("ARC_LEAVE_ON_SIGTERM") != "1":
        return
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    own = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() == own:
            raise SystemExit(128 + number)
        # A child (of a data loader) that inherited the handler is in no job.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    global _end
    _end = end
    signal.signal(signal.SIGTERM, end)


def exchange() -> Exchange:
    """The exchange that is open."""
    if _exchange is None:
        raise _native.ArcError(
            "this process is not in a job yet: call arc_topk.register(model), or make a DistributedOptimizer, first"
        )
    return _exchange


def exchange_of(parameter: torch.Tensor) -> tuple[Exchange, int] | None:
    """The exchange that averages this tensor's gradients, and its place there."""
    if _exchange is None or not _exchange.carries_gradients:
        return None
    index = _exchange.index.get(id(parameter))
    return None if index is None else (_exchange, index)


def shutdown() -> None:
    """Leaves the job in order. The others go on without this worker; nothing happens where there is no job."""
    global _exchange
    if _exchange is not None:
        _exchange.leave()
        _exchange = None
    if _end is not None and threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


atexit.register(shutdown)


def rank() -> int:
    """Rank of this worker: in the job once it has joined, else the one that it will ask for.

    With ``local_group`` a machine is one worker, and all its processes have its rank: ``torch.distributed.get_rank()`` tells them
    apart, for data of their own.
    """
    if _exchange is not None:
        return _exchange.rank
    asked = peers().rank
    if asked is None:
        raise _native.ArcError("this worker has no rank before it has joined a job, and none was asked for")
    return asked


def world_size() -> int:
    """Workers in the job now; before this one has joined, as many as it will wait for. With ``local_group``: machines."""
    if _exchange is not None:
        return _exchange.world_size
    expected = peers().world_size
    if expected is None:
        raise _native.ArcError("the number of workers is not known before this one has joined a job")
    return expected


def report(loss: float | torch.Tensor) -> None:
    """Says this worker's training loss, once a step and after ``backward()``, for the shards' status page and metrics.

    Optional: how long steps take, and how long they wait, is told without it.
    """
    exchange().report(loss)


def summary() -> Summary:
    """Bytes and times by phase since this worker joined. With ``local_group`` those of a machine are with its leader."""
    return exchange().summary
