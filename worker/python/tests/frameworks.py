"""What worker processes do with training frameworks; see test_frameworks.py."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import arc_topk
import jobs

# Groups stay to the end of the process. PyTorch takes one away with Python's lock in hand, and its thread may wait for that lock
# in order to give back a tensor: a deadlock, seen where a Trainer's last gathering of losses was just over.
_groups: list[Any] = []


def _forget_accelerate() -> None:
    """Accelerate keeps the process group and the rank in singletons."""
    state: Any = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@contextlib.contextmanager
def _launched(rank: int) -> Iterator[list[str]]:
    """What a launcher sets, beside RANK; nothing of a framework is left when it ends. Yields what arc_topk warns of."""
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("arc_topk").addHandler(listener)
    before = dict(os.environ)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": before["WORLD_SIZE"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    _forget_accelerate()
    try:
        yield said
    finally:
        _forget_accelerate()
        os.environ.clear()
        os.environ |= before
        logging.getLogger("arc_topk").removeHandler(listener)
        arc_topk.shutdown()
        if dist.is_initialized():
            _groups.append(dist.group.WORLD)
            dist.destroy_process_group()


def _outcome(net: nn.Module, said: list[str], averaged: bool) -> dict[str, Any]:
    """What is compared: parameters, and of arc_topk the feedback, the steps and the bytes."""
    result: dict[str, Any] = {"net": {name: p.detach().clone() for name, p in net.named_parameters()}, "said": said}
    if averaged:
        summary = arc_topk.summary()
        result |= {"arc": arc_topk.exchange().state_dict(), "steps": summary.steps, "sent": summary.bytes_sent}
    return result


def tiny_bert() -> nn.Module:
    """A classifier, from a config and not from a hub."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Random words, and whether the first is among the upper half."""
    words = torch.randint(64, (count, 12), generator=torch.Generator().manual_seed(6))
    return [{"input_ids": line, "labels": (line[0] >= 32).long()} for line in words]


def trainer(directory: str, steps: int, **more: Any) -> Any:
    """A Trainer with accumulation, clipping, dropout and checkpoints."""
    transformers: Any = importlib.import_module("transformers")
    optimizer = more.pop("optimizer", None)
    arguments = {"optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5} | more
    args = transformers.TrainingArguments(
        output_dir=directory,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        save_steps=3,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    return transformers.Trainer(model=tiny_bert(), args=args, train_dataset=sentences(64), optimizer_cls_and_kwargs=optimizer)


def hugging_face(
    rank: int, directory: str, settings: dict[str, Any] | None, steps: int, resume: Any = None, courses: int = 1, optim: str = "sgd"
) -> dict[str, Any]:
    """Training by Hugging Face's Trainer; ``settings`` of None: DDP's own averaging."""
    with _launched(rank) as said:
        more: dict[str, Any] = {"optim": optim}
        if optim == "catch-up":
            more = {"optimizer": (arc_topk.optim.AdamW, {"lr": 0.001})}
        training = trainer(directory, steps, **more)
        if settings is not None:
            importlib.import_module("arc_topk.integrations.transformers").register(training, **settings)
        for _ in range(courses):
            training.train(resume_from_checkpoint=resume)
        return _outcome(training.model, said, settings is not None)


def accelerate(rank: int, settings: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    """Accelerate's own loop, with accumulation and clipping."""
    with _launched(rank) as said:
        accelerator = importlib.import_module("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = jobs.model()
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
        if settings is not None:
            arc_topk.register(model, **settings)
        for step in range(2 * steps):
            with accelerator.accumulate(model):
                accelerator.backward(jobs.loss_of(model, rank, step))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        return _outcome(net, said, settings is not None)


class _Sines:
    """A LightningModule but for its base class: a small network; its batches are those of jobs.py, and differ between workers."""

    net: nn.Module
    rank: int

    def training_step(self, batch: int, _: int) -> torch.Tensor:
        return jobs.loss_of(self.net, self.rank, batch)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(6), batch_size=None)  # type: ignore[arg-type]  # a sequence will do

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


def lightning(
    rank: int,
    directory: str,
    settings: dict[str, Any] | None,
    epochs: int,
    resume: str | None = None,
    courses: int = 1,
    package: str = "lightning.pytorch",
) -> dict[str, Any]:
    """Lightning's Trainer, with accumulation, clipping and a checkpoint at the end: three updates an epoch."""
    pl: Any = importlib.import_module(package)
    integration = importlib.import_module("arc_topk.integrations.lightning")
    with _launched(rank) as said:
        # Lightning takes it out of the environment when a course ends.
        world = int(os.environ["WORLD_SIZE"])
        module = type("Sines", (_Sines, pl.LightningModule), {})()
        module.net, module.rank = jobs.model(), rank
        for _ in range(courses):
            training = pl.Trainer(
                accelerator="cpu",
                devices=world,
                strategy="ddp",
                callbacks=[] if settings is None else [integration.Callback(**settings)],
                max_epochs=epochs,
                accumulate_grad_batches=2,
                gradient_clip_val=0.5,
                use_distributed_sampler=False,
                default_root_dir=directory,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            training.fit(module, ckpt_path=resume)
        training.save_checkpoint(Path(directory) / "last.ckpt")
        return _outcome(module.net, said, settings is not None)
