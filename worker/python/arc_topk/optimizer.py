"""Any optimizer, with gradients averaged through the shards. No process group is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from . import _native
from ._exchange import Exchange, logger
from ._replica import Replica
from ._state import open_exchange
from .config import Config


class _Averaging:
    """What is added to the optimizer's own class. Attributes begin with ``_arc`` so that nothing of it is hidden."""

    _arc: _Averager

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            self._arc.synchronize()
            result = super().step() if self._arc.updates() else None  # type: ignore[misc]
        else:
            once = _Once(closure, self._arc)
            with contextlib.suppress(_NoUpdate):
                super().step(once)  # type: ignore[misc]
            result = once.loss
        self._arc.stepped()
        return result

    # The optimizer's own step, which it calls, has torch's hooks: they must not be put around this one as well.
    step.hooked = True  # type: ignore[attr-defined]

    def no_sync(self) -> Any:
        """In this context gradients only add up, as under DistributedDataParallel's ``no_sync``."""
        return self._arc.no_sync()

    @property
    def exchange(self) -> Exchange:
        """The worker's place in the job."""
        return self._arc.exchange


class _NoUpdate(Exception):
    """Ends the optimizer's step after its closure, before it has changed anything."""


class _Once:
    """The closure of one step, whose gradients are averaged when its backward ends."""

    def __init__(self, closure: Callable[[], Any], averager: _Averager) -> None:
        self._closure = closure
        self._averager = averager
        self._called = False
        self.loss: Any = None

    def __call__(self) -> Any:
        if self._called:
            raise _native.ConfigError(
                "this optimizer calls its closure more than once a step, as LBFGS does, and decides by each worker's own loss "
                "how often: workers would come apart. Use one that takes a step per gradient"
            )
        self._called = True
        with torch.enable_grad():
            self.loss = self._closure()
        self._averager.synchronize()
        if not self._averager.updates():
            raise _NoUpdate
        return self.loss


def extended(optimizer: torch.optim.Optimizer, more: type) -> Any:
    """The optimizer, state and all, as one of its own class with ``more`` before it."""
    both: Any = type(optimizer.__class__.__name__, (more, optimizer.__class__), {})
    wrapped = both.__new__(both)
    wrapped.__dict__.update(optimizer.__dict__)
    if hasattr(wrapped.__dict__.get("step"), "_wrapped_by_lr_sched"):
        # A scheduler that was made before has put its own there, which would pass by that of ``more``.
        del wrapped.__dict__["step"]
    return wrapped


def _is_alone(gradient: torch.Tensor) -> bool:
    """Whether nothing else uses the gradient's memory, which the worker computes in.

    Autograd hands on what it can: two gradients of one sum, or one and what a backward function still reads, may lie in one place.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    # Two: the tensor's own, and that of the object that is asked.
    return count is not None and count(gradient.untyped_storage()._cdata) <= 2


class _Averager:
    """Pushes gradients as backward makes them, and puts the means in their place when it ends."""

    def __init__(self, replica: Replica, parameters: list[torch.Tensor], scaler: Any | None, digest_every: int) -> None:
        self.replica = replica
        self.exchange = replica.exchange
        self._digest_every = digest_every
        self._lost: _native.Superseded | None = None
        self._parameters = parameters
        self._scaler = scaler
        self._syncs = True
        self._open = False
        self._skipped = False
        self._pushed: set[int] = set()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._came)

    def _came(self, parameter: torch.Tensor) -> None:
        if not self._syncs:
            return
        if not self._open:
            self._unless_lost(lambda: self.exchange.begin(self._scaler))
            self._open = True
            self._pushed = set()
            # At the end of this backward pass, as DistributedDataParallel does it.
            torch.autograd.Variable._execution_engine.queue_callback(self.synchronize)
        index = self.exchange.index[id(parameter)]
        if index in self._pushed:
            raise _native.ConfigError(
                f"{self.exchange.names[index]} got a second gradient in one backward pass: call backward once a step, and the "
                "passes before it under no_sync(); or the pass before was broken off by an error: make the optimizer anew"
            )
        gradient = parameter.grad
        assert gradient is not None
        if not _is_alone(gradient):
            gradient = parameter.grad = gradient.clone()
        self._pushed.add(index)
        self._unless_lost(lambda: self.exchange.push(index, gradient))

    def _unless_lost(self, act: Callable[[], Any]) -> None:
        """Gradients of one whose place is lost are nobody's: its backward ends in peace, and joins again when it has stepped."""
        if self._lost is not None:
            return
        try:
            act()
        except _native.Superseded as error:
            if not self.replica.elastic:
                raise
            # Nothing works in the gradients any more.
            self.exchange.session.leave()
            self._lost = error

    def synchronize(self) -> None:
        """Waits for the means of the gradients that were pushed."""
        if not self._open:
            return
        self._open = False
        results = []
        for parameter in self._parameters:
            if parameter.grad is None:
                # Unused here; others may have used it.
                parameter.grad = torch.zeros_like(parameter)
            results.append((self.exchange.index[id(parameter)], parameter.grad))
        self._unless_lost(lambda: self._finish(results))
        if self._lost is not None:
            # What is done with gradients before the step, such as clipping, finds nothing.
            for _, gradient in results:
                gradient.zero_()

    def _finish(self, results: list[tuple[int, torch.Tensor]]) -> None:
        self._skipped = self.exchange.finish(results).skipped

    def updates(self) -> bool:
        """Whether the step changes parameters: not if all skip it, because some gradient was not finite. Said once for each."""
        skipped, self._skipped = self._skipped, False
        if skipped:
            logger.warning("a gradient with a NaN or an infinity came from some worker: all workers skip this step")
        return not skipped and self._lost is None

    def stepped(self) -> None:
        """After the optimizer's step: sees to this worker's place, and to others'."""
        lost, self._lost = self._lost, None
        if lost is not None:
            self.replica.join_again(lost)
        self.replica.compare(self._digest_every)
        self.replica.attend()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before


def DistributedOptimizer(  # noqa: N802 - it stands for a class
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    config: Config | None = None,
    *,
    scaler: Any | None = None,
    state: Mapping[str, Any] | None = None,
    broadcast: bool = True,
    elastic: bool = True,
    digest_every: int = 100,
    **settings: Any,
) -> Any:
    """The optimizer, with gradients averaged with the other workers' when ``backward()`` ends.

    It stays what it was (an instance of its class, with its ``state_dict``, groups and schedulers). At the start the
    parameters of the first worker go to all others, unless ``broadcast`` is off. If the job runs already and the shards have
    room (``--max-workers``), this worker joins it with the state of another one, unless ``elastic`` is off:
    ``optimizer.exchange.step`` says at which step. So does a worker that was away for so long, or has come so far apart, that
    the job went on without it: that step's gradients are dropped, a warning is logged, and training goes on at the job's step
    (with ``elastic`` off :class:`arc_topk.Superseded` is raised). Every ``digest_every`` steps (0: never) workers tell shard 0 a
    hash of their parameters, which are compared there.

    The closure of a step is called once. A group of the optimizer may have a ``density`` of its own. ``config``, ``scaler``,
    ``state`` and single settings are those of :func:`arc_topk.register`.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise _native.ConfigError(
            "LBFGS evaluates its closure as often as each worker's own loss asks for, so that workers would come apart: use an "
            "optimizer that takes a step per gradient"
        )
    config = Config.of(config, settings)
    names = {id(p): name for name, p in named_parameters if p.requires_grad}
    densities = dict(config.densities)
    parameters: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            name = names.get(id(parameter))
            if name is None:
                raise _native.ConfigError(
                    "the optimizer has a parameter that named_parameters does not name: pass model.named_parameters()"
                )
            parameters.append(parameter)
            if "density" in group:
                # Its own name comes first among the patterns.
                densities = {name: float(group["density"]), **densities}
    config = Config(**{**vars(config), "densities": densities})
    _warn_of_adam(optimizer, config)
    named = [(names[id(parameter)], parameter) for parameter in parameters]
    exchange = open_exchange(named, config, state=state, elastic=elastic)
    wrapped = extended(optimizer, _Averaging)
    replica = Replica(exchange, parameters, {"optimizer": wrapped}, elastic=elastic)
    wrapped._arc = _Averager(replica, parameters, scaler, digest_every)
    replica.start(broadcast and state is None)
    return wrapped


def _warn_of_adam(optimizer: torch.optim.Optimizer, config: Config) -> None:
    """Rows that come seldom bring many gradients at once, which Adam's second moment squares."""
    adams = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
    sparse = config.compressor != "dense" and config.feedback == "ef14" and config.density < 0.5
    if isinstance(optimizer, adams) and sparse:
        logger.warning(
            "%s squares what a row brings after some steps at once, which costs accuracy at density %g: use "
            "arc_topk.optim.AdamW, a drop-in that knows how long a row was away",
            type(optimizer).__name__,
            config.density,
        )
