"""What all workers have alike, by way of the shards' store: at the start, and for one that joins."""

from __future__ import annotations

import io
import threading
import time

import torch

from . import _native
from ._exchange import Exchange, logger
from ._merge import joined_state, shared_arrays

# Between a donation that failed and the next attempt.
_PAUSE_SECONDS = 5.0


def pack(exchange: Exchange, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, bytes]:
    """The next step, and everything that is equal on all workers before it."""
    state = exchange.state_dict()
    blob = io.BytesIO()
    replica = {
        "step": state["step"],
        "update": state["update"],
        "shared": shared_arrays(state),
        "parameters": [parameter.detach().cpu() for parameter in parameters],
        "optimizer": optimizer.state_dict(),
    }
    torch.save(replica, blob)
    return state["step"], blob.getvalue()


def unpack(
    exchange: Exchange, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, blob: bytes, joins: bool
) -> None:
    """Takes over what :func:`pack` gave."""
    replica = torch.load(io.BytesIO(blob), weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, replica["parameters"], strict=True):
            parameter.copy_(value)
    if not joins:
        return
    optimizer.load_state_dict(replica["optimizer"])
    exchange.load(replica | {"arrays": joined_state(exchange.state_dict(), replica["shared"])})


def take(exchange: Exchange, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, broadcast: bool) -> None:
    """Starts with the parameters of the first worker, or, in a job that runs, with the state of another one."""
    joins = exchange.session.needs_snapshot()
    if not joins and not broadcast:
        return
    store = _native.Store(exchange.native_peers())
    run, step = exchange.session.run(), exchange.session.start_step()
    if not joins and exchange.rank == min(exchange.session.members()):
        store.put(run, step, pack(exchange, parameters, optimizer)[1])
        return
    unpack(exchange, parameters, optimizer, store.fetch(run, step), joins)
    if joins:
        logger.info("joined the running job at step %d as rank %d", step, exchange.rank)


class Donations:
    """Copies of this worker's state for those that join, put into the store beside training."""

    def __init__(self, exchange: Exchange, parameters: list[torch.Tensor]) -> None:
        self._exchange = exchange
        self._parameters = parameters
        self._thread: threading.Thread | None = None
        self._failed_at: float | None = None

    def attend(self, optimizer: torch.optim.Optimizer) -> None:
        """Between steps: starts one, if it is asked for."""
        session = self._exchange.session
        busy = self._thread is not None and self._thread.is_alive()
        paused = self._failed_at is not None and time.monotonic() < self._failed_at + _PAUSE_SECONDS
        if busy or paused or not session.donation_due():
            return
        step, blob = pack(self._exchange, self._parameters, optimizer)
        session.donating(step)
        self._thread = threading.Thread(target=self._put, args=(step, blob), name="arc-donate", daemon=True)
        self._thread.start()

    def _put(self, step: int, blob: bytes) -> None:
        session = self._exchange.session
        try:
            _native.Store(self._exchange.native_peers()).put(session.run(), step, blob)
            stored = True
        except _native.ArcError as error:
            logger.warning("the state for a worker that joins is not stored: %s", error)
            self._failed_at, stored = time.monotonic(), False
        try:
            session.donation_ended(step, stored)
        except _native.ArcError:
            logger.debug("the job was left while a copy was on its way")
