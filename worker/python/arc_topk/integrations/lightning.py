"""Lightning's ``Trainer``, with gradients averaged through the shards::

    trainer = Trainer(strategy="ddp", callbacks=[arc_topk.integrations.lightning.Callback(density=0.05)], ...)

(``DDPStrategy(ddp_comm_hook=...)`` would not do: Lightning registers hooks on GPUs alone, before it says what to go on from.)
Gradient accumulation, clipping, mixed precision and validation stay as they are.
"""

from __future__ import annotations

import importlib
from typing import Any

from .._exchange import Exchange
from ..config import Config
from . import _common


def _base() -> Any:
    """The class of callbacks, of whichever of its two names Lightning is installed under."""
    try:
        return importlib.import_module("lightning.pytorch").Callback
    except ImportError:
        return importlib.import_module("pytorch_lightning").Callback


_Base: Any = _base()


class Callback(_Base):  # type: ignore[misc]  # there may be no Lightning where types are checked
    """Averages the gradients of a module that is trained under ``strategy="ddp"`` through the shards, not the process group.

    ``config``, or settings of one by name (``density=0.05``), says what is computed. Checkpoints hold the feedback state of all
    ranks, which is gathered for it: as many floats as the model has, from every worker to the first. ``save_feedback=False`` leaves
    it out, and training that goes on from such a checkpoint starts with none, and with a warm-up. ``local_group`` is that of
    :func:`arc_topk.register`; since Lightning makes the process group later, it is ``"node"`` or a function.
    """

    def __init__(
        self, config: Config | None = None, *, save_feedback: bool = True, local_group: Any | None = None, **settings: Any
    ) -> None:
        super().__init__()
        #: The worker's place in the job, once training has begun.
        self.exchange: Exchange | None = None
        self._config = Config.of(config, settings)
        self._saves = save_feedback
        self._local_group = local_group
        self._group: Any = None
        self._restored: list[dict[str, Any]] | None = None

    @property
    def state_key(self) -> str:
        """Where the state lies in a checkpoint."""
        return "arc_topk"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - Lightning's call
        """Joins the job."""
        import torch.distributed as dist  # noqa: PLC0415 - PyTorch may be built without it

        model = _common.wrapped(trainer.strategy.model)
        for optimizer in trainer.optimizers:
            _common.warn_of_adam(optimizer, self._config)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.exchange = _common.join(model, self._config, self._state_of, self._local_group, scaler=scaler)
        # Feedback lies in the host's memory, where NCCL does not reach.
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def state_dict(self) -> dict[str, Any]:
        """The feedback states of all ranks, on the first. All call it, as they all call ``save_checkpoint``."""
        if self.exchange is None or not self._saves:
            return {}
        import torch.distributed as dist  # noqa: PLC0415

        states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.exchange.state_dict(), states, group=self._group)
        return {} if states is None else {"feedback": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what :meth:`state_dict` gave for the start of training."""
        self._restored = state_dict["feedback"]

    def _state_of(self, place: _common.Place) -> dict[str, Any] | None:
        restored, self._restored = self._restored, None
        return None if restored is None else place.of(restored)
