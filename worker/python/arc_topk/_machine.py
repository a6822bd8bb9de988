"""Hierarchical averaging: the processes of a machine are one worker of the job.

Each bucket is averaged within the machine while backward goes on. One process, the leader, has the session with the shards and the
feedback state; it pushes that mean, and tells the others what came of the step: the means, and which of their rows are fresh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import _native, _state
from ._buckets import gradients_of, promise, warn_of_skip
from ._exchange import Exchange, Summary, numbered, to_rows
from ._local_group import LocalGroup
from .config import Config

_ERRORS = {
    kind.__name__: kind
    for kind in (_native.ArcError, _native.ConfigError, _native.ConnectionFailed, _native.JobEnded, _native.Superseded)
}


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The leader has joined."""

    step: int
    update: int
    rank: int
    workers: int
    widths: list[int]


@dataclasses.dataclass(frozen=True)
class _Came:
    """What came of a step."""

    #: The next ones.
    step: int
    update: int
    skipped: bool
    density: float
    captured_energy: float | None
    workers: int
    #: Fresh rows of each tensor, as :meth:`_native.Session.rows` gives them; none at all after a step that was skipped.
    rows: list[bytes | None]

    @classmethod
    def of(cls, outcome: _native.Outcome, exchange: Exchange) -> _Came:
        rows = [] if outcome.skipped else [exchange.session.rows(index) for index in range(len(exchange.names))]
        workers = exchange.world_size
        return cls(exchange.step, exchange.update, outcome.skipped, outcome.density, outcome.captured_energy, workers, rows)


@dataclasses.dataclass(frozen=True)
class _Failed:
    """The leader cannot go on."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> _Failed:
        return cls(type(error).__name__, str(error) or type(error).__name__)


def _heard(group: LocalGroup) -> Any:
    """What the leader tells; raises what it failed with."""
    word = group.hear()
    if isinstance(word, _Failed):
        kind = _ERRORS.get(word.kind, _native.ArcError)
        raise kind(f"process {group.leader}, which speaks with the shards for this machine, failed: {word.text}")
    return word


class Follower(Exchange):
    """An exchange as the processes have it that do not lead: it is told what the leader's did, and has no session of its own."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], config: Config, joined: _Joined, leader: int) -> None:
        registered = numbered(tensors)
        self.names = [name for name, _ in registered]
        self.index = {id(tensor): at for at, (_, tensor) in enumerate(registered)}
        self.config = config
        self.gpu = None
        self.summary = Summary()
        self.carries_gradients = True
        self.auto = None
        self.step = joined.step
        self.rank = joined.rank
        self.widths = joined.widths
        self.update = joined.update
        self._workers = joined.workers
        self._rows: list[bytes | None] = [None] * len(self.names)
        self._leader = leader
        # There is never anything to tell a shard.
        self._lock = threading.Lock()
        self._news = None

    @property
    def session(self) -> Any:  # type: ignore[override]  # what would use it is not to be called
        raise _native.ArcError(f"process {self._leader} speaks with the shards for this machine, and this one has no session")

    @property
    def world_size(self) -> int:
        """Workers, that is machines, in the job when the last step ended."""
        return self._workers

    def take(self, came: _Came) -> None:
        """Goes to the next step."""
        self.summary.steps += 1
        self.summary.skipped += came.skipped
        self.summary.density = came.density
        self.summary.captured_energy = came.captured_energy
        self.step, self.update = came.step, came.update
        self._workers = came.workers
        if not came.skipped:
            self._rows = came.rows

    def fresh_rows(self, index: int) -> torch.Tensor | None:
        return to_rows(self._rows[index])

    def state_dict(self) -> dict[str, Any]:
        """The step, and that this process followed: what was not sent yet is the leader's."""
        return {"step": self.step, "update": self.update, "arrays": {}, "follower": True}

    def report(self, loss: float | torch.Tensor) -> None:
        """Nothing: shards hear of the leader's loss."""

    def leave(self) -> None:
        """Nothing: the leader is the worker."""


def join(
    group: LocalGroup, tensors: Iterable[tuple[str, torch.Tensor]], config: Config, state: Mapping[str, Any] | None
) -> Exchange:
    """Joins the job as one worker with the other processes of the machine, which call it at once."""
    registered = numbered(tensors)
    outline = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in registered]
    start = None if state is None else (state.get("step"), state.get("update"))
    _compare(group.ranks, group.gathered((outline, start)))
    if not group.leads:
        joined = _heard(group)
        return _state.enter(lambda: Follower(registered, config, joined, group.leader))
    try:
        exchange = _state.open_exchange(
            registered,
            config,
            # Shards compare it: a machine with more processes must not count as much as the others.
            trainer=f"local_world_size={group.size}\n",
            state=state,
            machine=(group.machine, group.machines),
        )
    except BaseException as error:
        group.tell(_Failed.of(error))
        raise
    group.tell(_Joined(exchange.step, exchange.update, exchange.rank, exchange.world_size, exchange.widths))
    return exchange


def _compare(ranks: Sequence[int], told: Sequence[tuple[Any, Any]]) -> None:
    """Raises ConfigError where processes of a machine come with other tensors, or another step, than their leader."""
    (tensors, start), leader = told[0], ranks[0]
    for rank, (others, elsewhere) in zip(ranks, told, strict=True):
        if others != tensors:
            pairs = zip(tensors, others, strict=False)
            here, there = next((pair for pair in pairs if pair[0] != pair[1]), (len(tensors), len(others)))
            raise _native.ConfigError(
                f"processes {leader} and {rank} of a machine differ in their tensors ({here} and {there}): give them the same "
                "model, and freeze the same parameters"
            )
        if elsewhere != start:
            raise _native.ConfigError(
                f"processes {leader} and {rank} of a machine go on from different steps and updates ({start} and {elsewhere}): "
                "give each its own state of the same step, or all of them the leader's"
            )


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """A bucket under way to the leader, and the promise of its mean over all machines."""

    reduced: Any
    gradients: list[tuple[int, torch.Tensor]]
    buffer: torch.Tensor
    future: Any


class _Arrivals:
    """The buckets of one step, from backward's thread to the one beside it."""

    def __init__(self) -> None:
        self.all: list[_Bucket] = []
        self._queue: queue.SimpleQueue[tuple[_Bucket, bool]] = queue.SimpleQueue()
        self._whole = False

    def put(self, bucket: _Bucket, last: bool) -> None:
        self._queue.put((bucket, last))

    def rest(self) -> Iterator[_Bucket]:
        """Those that have not been taken yet, up to the last one."""
        while not self._whole:
            bucket, self._whole = self._queue.get()
            self.all.append(bucket)
            yield bucket


class LocalHook:
    """State of the hook. In each step a thread beside backward does all waiting, so that backward goes on."""

    def __init__(self, model: nn.Module, exchange: Exchange, group: LocalGroup, scaler: Any | None) -> None:
        self.exchange = exchange
        self._group = group
        self._scaler = scaler
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._arrivals: _Arrivals | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, bucket: Any) -> Any:
        # Future[Tensor]; the types exist only where torch.distributed does.
        buffer = bucket.buffer()
        gradients = gradients_of(bucket, self.exchange, self._names)
        if self._arrivals is None:
            self._arrivals = _Arrivals()
            arguments = (self._arrivals, self._beside(buffer.device))
            threading.Thread(target=self._step, args=arguments, name="arc-machine", daemon=True).start()
        future = promise(buffer)
        # Reductions begin here, in the order of DDP's buckets, which is that of all processes. What the thread spreads comes after
        # the last of them, and before backward ends.
        self._arrivals.put(_Bucket(self._group.reduce(buffer), gradients, buffer, future), bucket.is_last())
        if bucket.is_last():
            self._arrivals = None
        return future

    def _beside(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Where the thread works on a GPU: backward's own stream must not wait for other processes."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

    def _step(self, arrivals: _Arrivals, beside: contextlib.AbstractContextManager[Any]) -> None:
        with beside:
            try:
                skipped = self._lead(arrivals) if self._group.leads else self._follow(arrivals)
                if skipped:
                    warn_of_skip(self._scaler)
                else:
                    self._group.spread(bucket.buffer for bucket in arrivals.all)
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
                for _ in arrivals.rest():
                    pass
                for bucket in arrivals.all:
                    bucket.future.set_exception(error)
                return
            for bucket in arrivals.all:
                bucket.future.set_result(bucket.buffer)

    def _lead(self, arrivals: _Arrivals) -> bool:
        """A step of the process that speaks with the shards. True: it was skipped."""
        try:
            self.exchange.begin(self._scaler)
            for bucket in arrivals.rest():
                bucket.reduced.wait()
                for index, gradient in bucket.gradients:
                    self.exchange.push(index, gradient)
            outcome = self.exchange.finish([pair for bucket in arrivals.all for pair in bucket.gradients])
            came = _Came.of(outcome, self.exchange)
        except BaseException as error:
            # Those that are gone themselves need not hear it.
            with contextlib.suppress(Exception):
                self._group.tell(_Failed.of(error))
            raise
        self._group.tell(came)
        return came.skipped

    def _follow(self, arrivals: _Arrivals) -> bool:
        """A step of one of the others."""
        for bucket in arrivals.rest():
            bucket.reduced.wait()
        came: _Came = _heard(self._group)
        follower = self.exchange
        assert isinstance(follower, Follower)
        follower.take(came)
        if came.skipped:
            for bucket in arrivals.all:
                bucket.buffer.fill_(float("nan"))
        return came.skipped
