"""The hook of ``mode="auto"``: each step goes through the shards or through the process group, as :class:`Auto` says."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ._auto import Auto, Way
from ._exchange import Exchange, logger
from .ddp import Hook


class AutoHook(Hook):
    """Times both ways and takes the faster one.

    An all-reduced step counts as an update of the exchange, so that the warm-up goes on, and not as a step. Once all-reduce is
    what steps go on with, the first of them averages what was not sent as well.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, scaler: Any | None, group: Any) -> None:
        super().__init__(model, exchange, scaler)
        self._group = group
        #: Decides.
        self.auto = Auto(exchange.config.warmup_updates + exchange.config.ramp_updates, exchange.update)
        self._began: float | None = None
        # The last step's time, on its way to the mean over all workers.
        self._telling: tuple[torch.Tensor, Any] | None = None
        # What the open step averages beside its gradients, by index, and whether its results so far are finite.
        self._flushed: dict[int, bytes] = {}
        self._finite: list[torch.Tensor] = []
        self._flush = False
        exchange.before_export = self._settle_flush
        exchange.auto = self.auto

    def __call__(self, bucket: Any) -> Any:
        if not self._open:
            self._begin(bucket.buffer().device)
        if self.auto.way is Way.SHARDS:
            return super().__call__(bucket)
        return self._all_reduce(bucket)

    def _begin(self, device: torch.device) -> None:
        """Before the first bucket of a step: which way it goes."""
        now = time.perf_counter()
        self._settle_flush()
        choice = self.auto.begin(self.exchange.update, self._told())
        if self._began is not None:
            # Nobody waits for it: it is asked for when the next step begins.
            seconds = torch.tensor([now - self._began], dtype=torch.float64, device=device)
            self._telling = seconds, dist.all_reduce(seconds, group=self._group, async_op=True)
        self._began = now
        if choice is not None:
            logger.info("auto: %s (density %g, %s)", choice.reason, self.exchange.config.density, self.exchange.config.wire_up)
            self.exchange.summary.choice = choice.reason
            self._flush = choice.way is Way.GROUP

    def _told(self) -> float | None:
        """What the step before the last took all workers, on average."""
        if self._telling is None:
            return None
        seconds, work = self._telling
        work.wait()
        return float(seconds) / dist.get_world_size(self._group)

    def _all_reduce(self, bucket: Any) -> Any:
        self._open = True
        buffer = bucket.buffer()
        if self._flush:
            self._add_residuals(bucket)
        flushing = self._flush
        if bucket.is_last():
            self._open = self._flush = False
            self.exchange.passed()
        buffer.div_(dist.get_world_size(self._group))
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        assert work is not None

        def averaged(future: Any) -> torch.Tensor:
            result: torch.Tensor = future.value()[0]
            if flushing:
                self._finite.append(torch.isfinite(result).all())
            return result

        return work.get_future().then(averaged)

    def _add_residuals(self, bucket: Any) -> None:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            index = self.exchange.index.get(id(parameter))
            held = b"" if index is None else self.exchange.session.swap_residual(index, b"")
            if index is None or not held:
                continue
            self._flushed[index] = held
            residual = torch.frombuffer(bytearray(held), dtype=torch.float32)[: gradient.numel()]
            scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
            # In the order in which its elements lie, as they were pushed.
            flat = torch.empty_like(gradient, dtype=torch.float32, device="cpu")
            torch.as_strided(flat, (flat.numel(),), (1,)).copy_(residual)
            gradient.add_(flat.to(gradient.device), alpha=scale)

    def _settle_flush(self) -> None:
        """Once a step that averaged what was not sent has ended: it is gone, or, if the step is of no use, held back again."""
        flushed, finite = self._flushed, self._finite
        self._flushed, self._finite = {}, []
        if flushed and not all(bool(each) for each in finite):
            for index, held in flushed.items():
                self.exchange.session.swap_residual(index, held)
            self._flush = True
