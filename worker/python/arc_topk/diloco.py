"""Local steps: workers train by themselves and average what they changed, every so many steps (DiLoCo, arXiv 2311.08105)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import _native
from ._exchange import Exchange
from ._replica import Replica
from ._state import open_exchange
from .config import Config
from .optimizer import extended

Outer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def nesterov(density: float) -> Outer:
    """DiLoCo's outer optimizer, Nesterov momentum at a rate of 0.7.

    DiLoCo's momentum of 0.9 is right where whole changes come. Under error feedback a row comes every 1/density rounds with
    what gathered meanwhile, and so much momentum makes it overshoot: at density 0.25 training diverged with 0.9 and learned
    with 0.5.
    """
    momentum = 0.9 if density >= 0.9 else 0.5
    return lambda parameters: torch.optim.SGD(parameters, lr=0.7, momentum=momentum, nesterov=True)


class _Local:
    """What is added to the optimizer's own class."""

    _arc_local: _Averager

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)  # type: ignore[misc]
        self._arc_local.stepped()
        return result

    # As in the wrapper: the optimizer's own step has torch's hooks.
    step.hooked = True  # type: ignore[attr-defined]

    def synchronize(self) -> None:
        """Averages now. All workers must call it after the same number of steps."""
        self._arc_local.synchronize()

    @property
    def exchange(self) -> Exchange:
        """The worker's place in the job."""
        return self._arc_local.exchange

    @property
    def outer(self) -> torch.optim.Optimizer:
        """The optimizer of what is common: its ``state_dict`` belongs to a checkpoint."""
        return self._arc_local.outer


class _Averager:
    def __init__(
        self,
        exchange: Exchange,
        parameters: list[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        sync_every: int,
        outer: Outer,
        *,
        elastic: bool,
        digest_every: int,
    ) -> None:
        self.exchange = exchange
        self._parameters = parameters
        # What all workers have had in common since the last synchronization.
        self._common: list[torch.Tensor] = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
        self.outer = outer(self._common)
        self._sync_every = sync_every
        self._steps = 0
        self._digest_every = digest_every
        # Whether the next round is open already.
        self._begun = False
        # The inner optimizer's state is each worker's own; one that joins begins better with another's than with none.
        alike = {"outer": self.outer, "inner": optimizer}
        self._replica = Replica(exchange, self._common, alike, elastic=elastic, taken=self._taken)

    def start(self, broadcast: bool) -> None:
        self._replica.start(broadcast)

    def stepped(self) -> None:
        self._steps += 1
        if self._steps % self._sync_every == 0:
            self.synchronize()
        elif not self._begun:
            # What others need has not changed since the last round.
            self._replica.attend()

    @torch.no_grad()
    def synchronize(self) -> None:
        try:
            self._round()
        except _native.Superseded as error:
            self._begun = False
            self._replica.join_again(error)
        self._replica.compare(self._digest_every)
        if not self._begun:
            self._replica.attend()

    def _round(self) -> None:
        behind = not self._begun and self.exchange.begin()
        self._begun = False
        means = []
        for parameter, common in zip(self._parameters, self._common, strict=True):
            index = self.exchange.index[id(parameter)]
            change = common.detach() - parameter.detach()
            if not behind:
                self.exchange.push(index, change)
            means.append((index, change))
        self._finish(means)

    def _finish(self, means: list[tuple[int, torch.Tensor]]) -> None:
        """Waits for the mean changes, and goes on from what comes of them."""
        skipped = self.exchange.finish(means).skipped
        for common, (_, mean) in zip(self._common, means, strict=True):
            common.grad = mean
        if not skipped:
            self.outer.step()
        self.outer.zero_grad()
        self._copy()

    @torch.no_grad()
    def _taken(self) -> None:
        """After another worker's state was taken: takes the rounds that the job has closed since, too.

        Local steps that were made before they are known would be lost, and the others wait only for one that is with them.
        """
        self._copy()
        if self.exchange.session.start_step() == 0:
            return
        while self.exchange.begin():
            indices = [self.exchange.index[id(parameter)] for parameter in self._parameters]
            self._finish([(index, torch.empty_like(common)) for index, common in zip(indices, self._common, strict=True)])
        self._begun = True
        self._steps = 0

    def _copy(self) -> None:
        for parameter, common in zip(self._parameters, self._common, strict=True):
            parameter.copy_(common)


def LocalSGD(  # noqa: N802 - it stands for a class
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    sync_every: int = 100,
    outer: Outer | None = None,
    config: Config | None = None,
    *,
    broadcast: bool = True,
    elastic: bool = True,
    digest_every: int = 10,
    **settings: Any,
) -> Any:
    """The optimizer, whose steps are a worker's own; every ``sync_every`` of them the workers average what they changed.

    The mean change is the gradient of an outer optimizer, made by ``outer`` from a list of parameters (:func:`nesterov` by
    default), whose result all workers go on from. Changes go through ARC-Top-K: what is not sent stays with its worker and is
    added to its next change. For links of 100 Mbit/s and less: bytes fall by ``sync_every``, beyond what compression saves.

    A worker may join while others train, and joins again when the job went on without it, as under
    :func:`arc_topk.DistributedOptimizer`: with what is common, and the inner optimizer's state, of another one. Steps of
    ``optimizer.exchange`` are rounds here, and ``digest_every`` counts them.
    """
    if sync_every < 1:
        raise _native.ConfigError(f"sync_every is {sync_every}: it is a number of steps, at least 1")
    # A warm-up of as many dense rounds as usual would be thousands of steps here.
    config = Config.of(config, settings if config is not None else {"warmup_updates": 1} | settings)
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    exchange = open_exchange(named, config, trainer=f"sync_every={sync_every}\n", elastic=elastic, gradients=False)
    wrapped = extended(optimizer, _Local)
    averager = _Averager(
        exchange,
        [p for _, p in named],
        wrapped,
        sync_every,
        outer or nesterov(config.density),
        elastic=elastic,
        digest_every=digest_every,
    )
    wrapped._arc_local = averager
    averager.start(broadcast)
    return wrapped
