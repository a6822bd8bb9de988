"""A communication hook for DistributedDataParallel."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import _machine, _native
from ._buckets import gradients_of, promise, warn_of_skip
from ._exchange import Exchange
from ._local_group import LocalGroup
from ._state import open_exchange
from .config import Config


class Hook:
    """State of the hook."""

    def __init__(self, model: nn.Module, exchange: Exchange, scaler: Any | None) -> None:
        self.exchange = exchange
        self._scaler = scaler
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._open = False
        self._waiting: list[tuple[Any, torch.Tensor]] = []
        self._results: list[tuple[int, torch.Tensor]] = []

    def __call__(self, bucket: Any) -> Any:
        # Future[Tensor]; the types exist only where torch.distributed does.
        if not self._open:
            self.exchange.begin(self._scaler)
            self._open = True
        for index, gradient in gradients_of(bucket, self.exchange, self._names):
            self.exchange.push(index, gradient)
            self._results.append((index, gradient))
        buffer = bucket.buffer()
        future = promise(buffer)
        self._waiting.append((future, buffer))
        if bucket.is_last():
            waiting, results = self._waiting, self._results
            self._open, self._waiting, self._results = False, [], []
            # Backward may go on meanwhile: it waits for the futures at its end. Its stream is where results are put.
            stream = torch.cuda.current_stream(buffer.device) if buffer.is_cuda else None
            finishing = threading.Thread(target=self._finish, args=(waiting, results, stream), name="arc-finish", daemon=True)
            finishing.start()
        return future

    def _finish(
        self, waiting: list[tuple[Any, torch.Tensor]], results: list[tuple[int, torch.Tensor]], stream: torch.cuda.Stream | None
    ) -> None:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            try:
                if self.exchange.finish(results).skipped:
                    warn_of_skip(self._scaler)
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
                for future, _ in waiting:
                    future.set_exception(error)
                return
            for future, buffer in waiting:
                future.set_result(buffer)


# Without annotations, which DDP compares with types that are there only with torch.distributed.
def _ddp_hook(hook, bucket):  # type: ignore[no-untyped-def]
    return hook(bucket)


def register(
    model: nn.Module,
    config: Config | None = None,
    *,
    scaler: Any | None = None,
    state: Mapping[str, Any] | None = None,
    local_group: Any | None = None,
    **settings: Any,
) -> Exchange:
    """Averages the gradients of a ``DistributedDataParallel`` model through the shards instead of its process group.

    ``config``, or settings of one by name (``density=0.05``), says what is computed. With a ``GradScaler`` pass it as
    ``scaler``: feedback is then kept in unscaled gradients, and outlives changes of the scale. ``state`` is what
    ``state_dict()`` of an earlier run's exchange gave on this rank. With ``mode="auto"`` the process group goes on averaging
    where that is faster; both ways are timed for it.

    ``local_group`` makes the processes of a machine one worker: each bucket is averaged among them first, and one of them, the
    leader, speaks with the shards, so that the network carries one worker's bytes for all. It is ``"node"`` under torchrun, or a
    process group of this machine's processes (``torch.distributed.new_subgroups(8)[0]``) or a function that makes one: on all
    processes alike, and of one size on all machines, else ConfigError is raised. Shards then count machines: ``arc-ps --workers``
    is their number.

    The gradient clipping, accumulation under ``no_sync()`` and mixed precision of the script stay as they are.
    """
    if not hasattr(model, "register_comm_hook"):
        raise _native.ConfigError(
            f"{type(model).__name__} is no DistributedDataParallel: wrap the model, or use arc_topk.DistributedOptimizer"
        )
    config = Config.of(config, settings)
    # What else has such a method is wrapped by DDP's rules.
    module: Any = model.module
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    wrapped: Any = model
    hook: Any
    if local_group is not None:
        if config.mode == "auto":
            raise _native.ConfigError(
                'mode is "auto", which compares the shards with the process group of all processes: it does not know local_group, '
                "so leave one of them out"
            )
        group = LocalGroup.agreed(local_group)
        exchange = _machine.join(group, named, config, state)
        hook = _machine.LocalHook(module, exchange, group, scaler)
    elif config.mode == "auto":
        from . import _auto_hook  # noqa: PLC0415 - PyTorch may be built without torch.distributed

        _auto_hook.check(config)
        exchange = open_exchange(named, config, trainer=_auto_hook.TRAINER, state=state, beside=True)
        hook = _auto_hook.AutoHook(module, exchange, scaler, wrapped.process_group)
    else:
        exchange = open_exchange(named, config, state=state)
        hook = Hook(module, exchange, scaler)
    wrapped.register_comm_hook(hook, _ddp_hook)
    return exchange
