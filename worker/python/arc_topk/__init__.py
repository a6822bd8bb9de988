"""Data-parallel PyTorch training on ordinary networks.

Gradients are averaged through the shards of arc-topk (``arc-ps``): a sketch of each picks the rows that matter, and only
those travel. With DistributedDataParallel::

    import arc_topk
    model = DistributedDataParallel(model)
    arc_topk.register(model)

Without a process group::

    optimizer = arc_topk.DistributedOptimizer(optimizer, model.named_parameters())
"""

try:
    import torch as _torch  # noqa: F401 - said here, once, and not in the middle of an import
except ImportError as _error:
    raise ImportError("arc_topk needs PyTorch 2.3 or later: pip install torch") from _error

from . import optim
from ._exchange import Exchange, Summary
from ._merge import merge_states
from ._native import ArcError, ConfigError, ConnectionFailed, JobEnded, Outcome, Superseded, __version__
from ._reduce import all_reduce
from ._state import exchange, init, rank, report, shutdown, summary, world_size
from .config import Config, Peers
from .ddp import register
from .diloco import LocalSGD
from .local import local
from .optim import RowAges, fresh_rows
from .optimizer import DistributedOptimizer

__all__ = [
    "ArcError",
    "Config",
    "ConfigError",
    "ConnectionFailed",
    "DistributedOptimizer",
    "Exchange",
    "JobEnded",
    "LocalSGD",
    "Outcome",
    "Peers",
    "RowAges",
    "Summary",
    "Superseded",
    "__version__",
    "all_reduce",
    "exchange",
    "fresh_rows",
    "init",
    "local",
    "merge_states",
    "optim",
    "rank",
    "register",
    "report",
    "shutdown",
    "summary",
    "world_size",
]
