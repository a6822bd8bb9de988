"""The hook of ``mode="auto"``: each step goes through the shards or through the process group, as :class:`Auto` says."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ._auto import Auto, Way
from ._buckets import gradients_of
from ._exchange import Exchange, logger, to_bytes, to_tensor
from ._native import ConfigError
from ._tensors import flat, is_dense
from .config import Config
from .ddp import Hook

#: What shards compare between workers: one that does not take turns would wait for the others for ever.
TRAINER = "mode=auto\n"


def check(config: Config) -> None:
    """Raises ConfigError for what all-reduced steps in between would spoil."""
    if config.compressor != "dense" and config.feedback in ("ef21", "ef21m"):
        raise ConfigError(
            f'mode is "auto" and feedback is {config.feedback}, whose estimates stand still while the process group averages: '
            "use feedback ef14, or leave the mode out"
        )


class AutoHook(Hook):
    """Times both ways and takes the faster one.

    An all-reduced step counts as an update of the exchange, so that the warm-up goes on, and not as a step. The first of them
    after steps through the shards averages what those have not sent as well.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, scaler: Any | None, group: Any) -> None:
        super().__init__(model, exchange, scaler)
        self._group = group
        # Times are numbers in main memory: a GPU would have to catch up before one could be told or read.
        members = torch.distributed.get_process_group_ranks(group)
        gloo = torch.distributed.get_backend(group) == "gloo"
        self._words: Any = group if gloo else torch.distributed.new_group(members, backend="gloo", use_local_synchronization=True)
        self._check_start()
        schedule = exchange.config.warmup_updates + exchange.config.ramp_updates
        #: Decides.
        self.auto = Auto(schedule, exchange.update)
        self._began: float | None = None
        # The last step's time, on its way to the mean over all workers.
        self._telling: tuple[torch.Tensor, Any] | None = None
        # Whether something may be held back, whether the open step takes it along, and what it took, by index.
        self._holds = exchange.update > 0
        self._flush = False
        self._flushed: dict[int, bytes] = {}
        # Whether the results of a step that took something along are finite, by bucket.
        self._finite: list[torch.Tensor] = []
        exchange.before_export = self._settle_flush
        exchange.auto = self.auto

    def _check_start(self) -> None:
        """All workers begin at the same update, else they would choose differently. Shards compare the step alone."""
        own = (self.exchange.step, self.exchange.update)
        told: list[Any] = [None] * torch.distributed.get_world_size(self._words)
        torch.distributed.all_gather_object(told, own, group=self._words)
        starts = sorted(set(told))
        if len(starts) > 1:
            raise ConfigError(f"workers begin at different steps and updates, {starts}: resume all from one checkpoint")

    def __call__(self, bucket: Any) -> Any:
        if not self._open:
            self._begin()
        if self.auto.way is Way.SHARDS:
            return super().__call__(bucket)
        return self._all_reduce(bucket)

    def _begin(self) -> None:
        """Before the first bucket of a step: which way it goes."""
        now = time.perf_counter()
        self._settle_flush()
        choice = self.auto.begin(self.exchange.update, self._told())
        if self._began is not None:
            # It is asked for when the next step begins.
            seconds = torch.tensor([now - self._began], dtype=torch.float64)
            self._telling = seconds, torch.distributed.all_reduce(seconds, group=self._words, async_op=True)
        self._began = now
        if choice is not None:
            config = self.exchange.config
            logger.info("auto: %s (density %g, %s)", choice.reason, config.density, config.wire_up)
            self.exchange.summary.choice = choice.reason
        self._flush = self.auto.way is Way.GROUP and self._holds
        self._holds = self.auto.way is Way.SHARDS

    def _told(self) -> float | None:
        """What the step before the last took all workers, on average."""
        if self._telling is None:
            return None
        seconds, work = self._telling
        work.wait()
        return float(seconds) / torch.distributed.get_world_size(self._words)

    def _all_reduce(self, bucket: Any) -> Any:
        self._open = True
        buffer = bucket.buffer()
        flushing = self._flush
        if flushing:
            self._add_residuals(bucket)
        if bucket.is_last():
            self._open = False
            self.exchange.passed()
        buffer.div_(torch.distributed.get_world_size(self._group))
        work = torch.distributed.all_reduce(buffer, group=self._group, async_op=True)
        assert work is not None

        def averaged(future: Any) -> torch.Tensor:
            result: torch.Tensor = future.value()[0]
            if flushing:
                self._finite.append(torch.isfinite(result).all())
            return result

        return work.get_future().then(averaged)

    def _add_residuals(self, bucket: Any) -> None:
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        for index, gradient in gradients_of(bucket, self.exchange, self._names):
            # DDP throws away what comes of a parameter that no worker used. Each worker can keep its own.
            if not gradient.any():
                continue
            held = self.exchange.session.swap_residual(index, b"")
            if held:
                left = _add(gradient, held, scale)
                self._flushed[index] = held
                if left is not None:
                    self.exchange.session.swap_residual(index, left)

    def _settle_flush(self) -> None:
        """Once a step that took along what was not sent has ended: it is gone, or, if the step is of no use, held back again."""
        flushed, finite = self._flushed, self._finite
        self._flushed, self._finite = {}, []
        if flushed and not all(bool(each) for each in finite):
            for index, held in flushed.items():
                self.exchange.session.swap_residual(index, held)
            self._holds = True


def _add(gradient: torch.Tensor, held: bytes, scale: float) -> bytes | None:
    """Adds what was held back, times the scale, to the gradient. What its type cannot hold of it, if any."""
    values = to_tensor(held)[: gradient.numel()]
    # In the order in which its elements lie, as they were pushed.
    residual = torch.empty_like(gradient, dtype=torch.float32, device="cpu")
    if is_dense(residual):
        flat(residual).copy_(values)
    else:
        residual.copy_(values.view(residual.shape))
    residual = residual.to(gradient.device)
    if gradient.dtype == torch.float32:
        gradient.add_(residual, alpha=scale)
        return None
    before = gradient.float()
    after = (before + scale * residual).to(gradient.dtype)
    if torch.isfinite(before).all() and not torch.isfinite(after).all():
        # Too much for the type at this scale: it waits for the next change of ways.
        return held
    lost = residual - (after.float() - before) / scale
    gradient.copy_(after)
    # With the zeros that fill up the last row.
    left = torch.zeros(len(held) // 4)
    left[: lost.numel()] = (flat(lost) if is_dense(lost) else lost.reshape(-1)).cpu()
    return to_bytes(left)
