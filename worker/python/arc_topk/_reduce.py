"""The low-level call: means of some tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import _native, _state
from ._exchange import Exchange
from ._state import open_exchange
from .config import Config

_own: tuple[Exchange, list[tuple[tuple[int, ...], torch.dtype]]] | None = None


def all_reduce(
    tensors: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    config: Config | None = None,
    **settings: Any,
) -> None:
    """Replaces each tensor, in place, by the mean of what the workers gave.

    The first call joins the job; all later ones take as many tensors, of the same shapes and types in the same order, on all
    workers. Under the default settings a call brings the rows that matter most, and what was not sent is kept and added to
    the next call's tensors, which is right for gradients; ``all_reduce(tensors, compressor="dense")`` brings exact means.
    """
    global _own
    named = (
        list(tensors.items()) if isinstance(tensors, Mapping) else [(f"tensor.{at}", tensor) for at, tensor in enumerate(tensors)]
    )
    shapes = [(tuple(tensor.shape), tensor.dtype) for _, tensor in named]
    if _own is None or _state._exchange is not _own[0]:
        _own = (open_exchange(named, Config.of(config, settings), gradients=False), shapes)
    exchange, known = _own
    if shapes != known:
        raise _native.ConfigError(
            f"the first call had {len(known)} tensors of certain shapes and types, this one has others: give the same ones in "
            "the same order, or call arc_topk.shutdown() before"
        )
    try:
        if not exchange.begin():
            for index, (_, tensor) in enumerate(named):
                exchange.push(index, tensor)
        exchange.finish([(index, tensor) for index, (_, tensor) in enumerate(named)])
    except BaseException:
        # The tensors are the caller's again.
        exchange.abandon()
        raise
