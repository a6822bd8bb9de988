"""What the process has told arc_topk, and the exchange that it has open."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from . import _native
from ._exchange import Exchange
from .config import Config, Peers

_peers: Peers | None = None
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
    global _peers
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
) -> Exchange:
    """Joins the job with these tensors. A process is one worker, and has one exchange at a time.

    ``gradients``: what is exchanged is the gradients of these tensors, so that optimizers may ask which of their rows came.
    ``beside``: there is a process group, which could average them as well.
    """
    global _exchange
    if _exchange is not None:
        raise _native.ConfigError(
            "this process is a member of a job already, with the tensors of the model that was registered or wrapped: do that "
            "once; call arc_topk.shutdown() before it joins with others"
        )
    if config.mode == "auto" and not beside:
        raise _native.ConfigError(
            'mode is "auto", which compares the shards with a process group: it is for arc_topk.register(model) with a '
            "DistributedDataParallel model; leave it out here"
        )
    _leave_when_asked_to_end()
    _exchange = Exchange(tensors, config, peers(), trainer=trainer, state=state, elastic=elastic)
    _exchange.carries_gradients = gradients
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
    """Rank of this worker: in the job once it has joined, else the one that it will ask for."""
    if _exchange is not None:
        return _exchange.rank
    asked = peers().rank
    if asked is None:
        raise _native.ArcError("this worker has no rank before it has joined a job, and none was asked for")
    return asked


def world_size() -> int:
    """Workers in the job now; before this one has joined, as many as it will wait for."""
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


def summary() -> Any:
    """Bytes and times by phase since this worker joined: a :class:`Summary`."""
    return exchange().summary
