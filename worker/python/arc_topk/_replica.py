"""What all workers have alike, by way of the shards' store: at the start, for one that joins, and for one that joins again."""

from __future__ import annotations

import ctypes
import hashlib
import io
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import _native
from ._exchange import Exchange, logger
from ._merge import joined_state, shared_arrays

# Between a donation that failed and the next attempt.
_PAUSE_SECONDS = 5.0


class Replica:
    """What a worker has alike with all others: handed to those that join, and taken where this one joins."""

    def __init__(
        self,
        exchange: Exchange,
        parameters: list[torch.Tensor],
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        elastic: bool,
        taken: Callable[[], None] = lambda: None,
    ) -> None:
        """``taken`` is called when the parameters were replaced."""
        self.exchange = exchange
        self.elastic = elastic
        self._parameters = parameters
        self._optimizers = optimizers
        self._taken = taken
        self._rejoins = Rejoins()
        self._donations = Donations()
        self._compared = exchange.step

    def start(self, broadcast: bool) -> None:
        """Starts with the parameters of the first worker, or, in a job that runs, with the state of another one."""
        try:
            self._take(broadcast)
        except _native.Superseded as error:
            self.join_again(error)

    def join_again(self, error: _native.Superseded) -> None:
        """Goes on as a newcomer, with another worker's state, after the job went on without this one."""
        while True:
            pause = self._rejoins.next_pause(self.exchange.step) if self.elastic else None
            if pause is None:
                raise error
            logger.warning("%s; joining again in %.0f s: the open step's gradients and the residual are dropped", error, pause)
            time.sleep(pause)
            try:
                self.exchange.join_again()
                self._take(broadcast=False)
            except _native.Superseded as again:
                error = again
                continue
            except _native.ConnectionFailed as failed:
                # There may be nothing left to join. Why it had to is told, too.
                raise failed from error
            logger.warning(
                "joined again, with another worker's state, at step %d as rank %d: whatever counts steps or ranks beside the "
                "optimizer must follow",
                self.exchange.step,
                self.exchange.rank,
            )
            return

    def attend(self) -> None:
        """Between steps: starts to put a copy into the store, if one that joins needs it."""
        self._donations.attend(self.exchange, self.pack)

    def compare(self, every: int) -> None:
        """Between steps: tells shard 0, which compares them, a hash of the parameters, every so many steps."""
        step = self.exchange.step
        if every < 1 or step % every != 0 or step == self._compared:
            return
        self._compared = step
        self.exchange.session.digest(step, _digest(self._parameters))

    def pack(self) -> tuple[int, bytes]:
        """The next step, and everything that is equal on all workers before it."""
        state = self.exchange.state_dict()
        replica = {
            "step": state["step"],
            "update": state["update"],
            "shared": shared_arrays(state),
            "parameters": [parameter.detach().cpu() for parameter in self._parameters],
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
        }
        blob = io.BytesIO()
        torch.save(replica, blob)
        return state["step"], blob.getvalue()

    def _take(self, broadcast: bool) -> None:
        exchange = self.exchange
        joins = exchange.session.needs_snapshot()
        if not joins and not broadcast:
            return
        store = _native.Store(exchange.native_peers())
        run, step = exchange.session.run(), exchange.session.start_step()
        if not joins and exchange.rank == min(exchange.session.members()):
            store.put(run, step, self.pack()[1])
            return
        try:
            blob = store.fetch(run, step)
        except _native.ArcError as error:
            if not joins:
                raise
            # The donor may have gone; shard 0 asks another one for the next that comes.
            raise _native.Superseded(f"the state that was stored for this worker cannot be had: {error}") from error
        self._unpack(blob, joins)
        self._taken()
        if joins:
            logger.info("joined the running job at step %d as rank %d", step, exchange.rank)

    def _unpack(self, blob: bytes, joins: bool) -> None:
        replica = torch.load(io.BytesIO(blob), weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self._parameters, replica["parameters"], strict=True):
                parameter.copy_(value)
        if not joins:
            return
        for name, optimizer in self._optimizers.items():
            load_in_place(optimizer, replica["optimizers"][name])
        arrays = joined_state(self.exchange.state_dict(), replica["shared"])
        self.exchange.load(replica | {"arrays": arrays})


class Rejoins:
    """How often a worker has joined again, and how long it pauses before it does."""

    # Steps after which joining counts as a success.
    PROGRESS = 50
    MOST = 6

    def __init__(self) -> None:
        self._in_a_row = 0
        self._before: int | None = None

    def next_pause(self, step: int) -> float | None:
        """The pause before the next attempt, if there is to be one, of a worker that has come to ``step``."""
        if self._before is not None and step >= self._before + self.PROGRESS:
            self._in_a_row = 0
        self._before = step
        self._in_a_row += 1
        return float(2 ** (self._in_a_row - 1)) if self._in_a_row <= self.MOST else None


class Donations:
    """Copies of this worker's state for those that join, put into the store beside training."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed_at: float | None = None

    def attend(self, exchange: Exchange, pack: Callable[[], tuple[int, bytes]]) -> None:
        """Between steps: starts one, if it is asked for."""
        session = exchange.session
        busy = self._thread is not None and self._thread.is_alive()
        paused = self._failed_at is not None and time.monotonic() < self._failed_at + _PAUSE_SECONDS
        if busy or paused or not session.donation_due():
            return
        step, blob = pack()
        session.donating(step)
        arguments = (session, exchange.native_peers(), step, blob)
        self._thread = threading.Thread(target=self._put, args=arguments, name="arc-donate", daemon=True)
        self._thread.start()

    def _put(self, session: _native.Session, peers: str, step: int, blob: bytes) -> None:
        try:
            _native.Store(peers).put(session.run(), step, blob)
            stored = True
        except _native.ArcError as error:
            logger.warning("the state for a worker that joins is not stored: %s", error)
            self._failed_at, stored = time.monotonic(), False
        try:
            session.donation_ended(step, stored)
        except _native.ArcError:
            logger.debug("the job was left while a copy was on its way")


def load_in_place(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state into the groups and the table that are there: schedulers, and an optimizer that was wrapped, hold them."""
    groups, table = optimizer.param_groups, optimizer.state
    optimizer.load_state_dict(state)
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group.clear()
        group.update(loaded)
    loaded_table = dict(optimizer.state)
    table.clear()
    table.update(loaded_table)
    optimizer.param_groups, optimizer.state = groups, table


def _digest(tensors: list[torch.Tensor]) -> bytes:
    """SHA-256 of all elements."""
    sha = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().to("cpu").contiguous()
        if values.numel():
            sha.update((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
    return sha.digest()
