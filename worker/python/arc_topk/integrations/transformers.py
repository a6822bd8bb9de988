"""Hugging Face's ``Trainer``, with gradients averaged through the shards::

    trainer = Trainer(...)
    arc_topk.integrations.transformers.register(trainer, density=0.05)
    trainer.train()

Started by ``arc-worker local``, ``torchrun`` or ``accelerate launch``, the Trainer makes a ``DistributedDataParallel`` of its
model; here a hook is put on that. Gradient accumulation, clipping, mixed precision and evaluation stay as they are.

Beside each checkpoint every rank puts its feedback state (``arc_topk_0.pt``, ...), from which ``train(resume_from_checkpoint=...)``
goes on, with another number of workers too where all of them see the files. ``save_only_model`` leaves it out.
"""

from __future__ import annotations

import functools
import importlib
import logging
from pathlib import Path
from typing import Any

import torch

from .._exchange import Exchange
from .._native import ConfigError
from ..config import Config
from . import _common

logger = logging.getLogger("arc_topk")


class _Averaging:
    """A callback of the Trainer, but for its base class."""

    def __init__(self, trainer: Any, config: Config, local_group: Any | None) -> None:
        self.exchange: Exchange | None = None
        #: What ``train`` was told to go on from.
        self.resumes: str | bool | None = None
        self._trainer = trainer
        self._config = config
        self._local_group = local_group
        self._local_world_size = 1
        self._model: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the Trainer's call
        model = _common.wrapped(self._trainer.model_wrapped)
        checkpoint = self._checkpoint(args)
        if model is self._model:
            # A second train(): the Trainer keeps its wrapped model, and a hook stays for good.
            if checkpoint is not None:
                logger.warning("feedback goes on from what this process has, and not from %s: it has trained already", checkpoint)
            return
        _common.warn_of_adam(self._trainer.optimizer, self._config)
        scaler = getattr(self._trainer.accelerator, "scaler", None)

        def restored(place: _common.Place) -> dict[str, Any] | None:
            self._local_world_size = place.local_world_size
            return _restored(checkpoint, place)

        self.exchange = _common.join(model, self._config, restored, self._local_group, scaler=scaler)
        self._model = model

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the Trainer's call
        if args.save_only_model or self.exchange is None:
            return
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Of another machine, with a disk of its own, this may be the first file.
        directory.mkdir(parents=True, exist_ok=True)
        counts = {"world_size": args.world_size, "local_world_size": self._local_world_size}
        saved = counts | {"state": self.exchange.state_dict()}
        torch.save(saved, _file(directory, args.process_index))

    def _checkpoint(self, args: Any) -> Path | None:
        found = self.resumes
        if found is True:
            found = importlib.import_module("transformers.trainer_utils").get_last_checkpoint(args.output_dir)
        return Path(found) if found else None


def _file(directory: Path, rank: int) -> Path:
    return directory / f"arc_topk_{rank}.pt"


def _restored(directory: Path | None, place: _common.Place) -> dict[str, Any] | None:
    """The feedback state that this process goes on from."""
    if directory is None:
        return None
    own = _file(directory, place.process)
    # One that was not there before learns from the first one's file how many there were.
    any_file = own if own.exists() else _file(directory, 0)
    if not any_file.exists():
        logger.warning("%s has no feedback state (%s): it starts empty, with a warm-up", directory, any_file.name)
        return None
    saved = torch.load(any_file, weights_only=True)
    counts = (saved["world_size"], saved.get("local_world_size", 1))
    if counts == (place.processes, place.local_world_size) and any_file == own:
        state: dict[str, Any] = saved["state"]
        return state
    files = [_file(directory, other) for other in range(saved["world_size"])]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ConfigError(
            f"{directory} lacks {', '.join(missing)}: for another number of workers each needs the feedback of all of them, "
            "so put all their files into it, or delete them all to start with none"
        )
    return place.of([torch.load(file, weights_only=True)["state"] for file in files])


def register(trainer: Any, config: Config | None = None, *, local_group: Any | None = None, **settings: Any) -> None:
    """Averages the gradients of a ``Trainer`` (or of a class that extends it) through the shards instead of its process group.

    Call it before ``train``, which then also restores feedback from the checkpoint that it goes on from. ``config``, or settings of
    one by name (``density=0.05``), says what is computed. The Trainer's own AdamW squares what a row brings after some steps at
    once; ``Trainer(optimizer_cls_and_kwargs=(arc_topk.optim.AdamW, {"lr": 5e-5}), ...)`` takes one that does not.

    ``local_group`` is that of :func:`arc_topk.register`.
    """
    base = importlib.import_module("transformers").TrainerCallback
    callback = type("ArcTopK", (_Averaging, base), {})(trainer, Config.of(config, settings), local_group)
    trainer.add_callback(callback)
    train = trainer.train

    # Callbacks are not told what training goes on from.
    @functools.wraps(train)
    def remembering(resume_from_checkpoint: str | bool | None = None, *arguments: Any, **more: Any) -> Any:
        callback.resumes = resume_from_checkpoint
        return train(resume_from_checkpoint, *arguments, **more)

    trainer.train = remembering
