"""What DistributedDataParallel's buckets hold, and what is promised for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import _native
from ._exchange import Exchange, logger


def gradients_of(bucket: Any, exchange: Exchange, names: Mapping[int, str]) -> list[tuple[int, torch.Tensor]]:
    """The bucket's gradients, by their places in the exchange; ``names`` are those of all parameters, by ``id``.

    They are known by their parameters, so DDP may rebuild its buckets as it likes.
    """
    found = []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        index = exchange.index.get(id(parameter))
        if index is None:
            name = names.get(id(parameter), "a parameter")
            raise _native.ConfigError(
                f"{name} had no gradient when the hook was registered: register after freezing and unfreezing, on all workers alike"
            )
        found.append((index, gradient))
    return found


def promise(buffer: torch.Tensor) -> Any:
    """What the hook returns for a bucket. Whoever waits for it waits for what the finishing thread has asked of the GPU, too."""
    return torch.futures.Future(devices=[buffer.device]) if buffer.is_cuda else torch.futures.Future()


def warn_of_skip(scaler: Any | None) -> None:
    """Says that all skipped a step, where no GradScaler sees to it."""
    if scaler is None:
        logger.warning(
            "a gradient with a NaN or an infinity came from some worker: all workers skip this step, and gradients "
            "are NaN, as after dense averaging; without a GradScaler look at them before the optimizer's step"
        )
