"""Practices of real training, each as two workers do it; see test_practices.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import arc_topk
import jobs


class Tied(nn.Module):
    """Two layers that share a weight, one that is frozen, one that is not always used, and a gradient checkpoint."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(12, 32)
        self.inner = nn.Linear(32, 32)
        self.frozen = nn.Linear(32, 32)
        self.frozen.requires_grad_(False)
        self.seldom = nn.Linear(32, 32)
        self.out = nn.Linear(32, 12, bias=False)
        self.out.weight = nn.Parameter(self.embed.weight.detach().T.clone())
        self.tied = nn.Linear(32, 32)
        self.tied.weight = self.inner.weight
        self.checkpoints = checkpoints

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(torch.tanh(self.frozen(torch.tanh(self.inner(x)))))

    def forward(self, x: torch.Tensor, seldom: bool) -> torch.Tensor:
        x = torch.tanh(self.embed(x))
        x = x + (checkpoint(self.middle, x, use_reentrant=False) if self.checkpoints else self.middle(x))
        return self.out(x + self.seldom(x) if seldom else x)


class Conv(nn.Module):
    """Convolutions, whose weights may lie channels last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def _wrapped(net: nn.Module, form: str, settings: dict[str, Any], **more: Any) -> tuple[nn.Module, Any]:
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    if form != "wrapper":
        net_or_ddp = DistributedDataParallel(net, **more)
        arc_topk.register(net_or_ddp, local_group=jobs.machine_of(form), **settings, **jobs.mode_of(form))
        return net_or_ddp, optimizer
    trainable = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trainable], lr=0.05)
    return net, arc_topk.DistributedOptimizer(optimizer, trainable, **settings)


def _train(
    form: str, make: Callable[[], nn.Module], loss: Callable[[nn.Module, int], torch.Tensor], settings: dict[str, Any], **more: Any
) -> dict[str, torch.Tensor]:
    with jobs.process_group() if form != "wrapper" else contextlib.nullcontext():
        net = make()
        net_or_ddp, optimizer = _wrapped(net, form, settings, **more)
        for step in range(6):
            optimizer.zero_grad()
            loss(net_or_ddp, step).backward()
            optimizer.step()
        arc_topk.shutdown()
        return {name: value.detach().clone() for name, value in net.state_dict().items()}


def awkward(rank: int, form: str, checkpoints: bool, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Frozen, tied and unused parameters: one layer is used by rank 1 alone, in every second step."""

    def loss(net: nn.Module, step: int) -> torch.Tensor:
        inputs, _ = jobs.batch(rank, step)
        return nn.functional.mse_loss(net(inputs, rank == 1 and step % 2 == 0), inputs)

    more = {"find_unused_parameters": True} if form != "wrapper" else {}
    return _train(form, lambda: Tied(checkpoints), loss, settings, **more)


def images(rank: int, form: str, last: bool) -> dict[str, torch.Tensor]:
    """A convolutional network, its channels last or first."""
    layout = torch.channels_last if last else torch.contiguous_format

    def loss(net: nn.Module, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * step + rank)
        inputs = torch.randn(8, 3, 8, 8, generator=generator).to(memory_format=layout)
        return net(inputs).square().mean()

    net: Any = Conv()
    return _train(form, lambda: net.to(memory_format=layout), loss, jobs.LOSSLESS)


def narrow(rank: int, form: str) -> dict[str, torch.Tensor]:
    """Parameters in bfloat16."""

    def loss(net: nn.Module, step: int) -> torch.Tensor:
        inputs, wanted = jobs.batch(rank, step)
        return nn.functional.mse_loss(net(inputs.bfloat16()), wanted.bfloat16())

    return _train(form, lambda: jobs.model().bfloat16(), loss, jobs.SPARSE)


def compiled(rank: int, form: str) -> dict[str, torch.Tensor]:
    """torch.compile around the model; its eager backend needs no compiler here."""
    with jobs.process_group() if form == "ddp" else contextlib.nullcontext():
        net = jobs.model()
        net_or_ddp, optimizer = _wrapped(net, form, jobs.LOSSLESS)
        fast: Any = torch.compile(net_or_ddp, backend="eager")
        for step in range(4):
            optimizer.zero_grad()
            jobs.loss_of(fast, rank, step).backward()
            optimizer.step()
        arc_topk.shutdown()
        return {name: value.detach().clone() for name, value in net.state_dict().items()}


def grouped(rank: int) -> dict[str, Any]:
    """Groups of the optimizer with densities of their own."""
    net = jobs.model()
    first, *others = net.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "density": 0.5}, {"params": others}]
    optimizer: Any = torch.optim.SGD(groups, lr=0.05)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **jobs.SPARSE)
    jobs.loss_of(net, rank, 0).backward()
    fresh = {name: arc_topk.fresh_rows(p) for name, p in net.named_parameters()}
    arc_topk.shutdown()
    return {"rows": {name: None if rows is None else len(rows) for name, rows in fresh.items()}}


def resumed(rank: int, form: str, steps: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """Some steps of training, from what an earlier run left behind if there is anything."""
    with jobs.process_group() if form == "ddp" else contextlib.nullcontext():
        net = jobs.model()
        first, kept = 0, None
        if state is not None:
            mine = state[f"rank {rank}"]
            net.load_state_dict(mine["net"])
            first, kept = mine["step"], mine["arc"]
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
        if form == "ddp":
            net_or_ddp: nn.Module = DistributedDataParallel(net)
            exchange = arc_topk.register(net_or_ddp, state=kept, **jobs.SPARSE)
        else:
            net_or_ddp = net
            optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), state=kept, **jobs.SPARSE)
            exchange = optimizer.exchange
        for step in range(first, first + steps):
            optimizer.zero_grad()
            jobs.loss_of(net_or_ddp, rank, step).backward()
            optimizer.step()
        arc = exchange.state_dict()
        arc_topk.shutdown()
        return {"net": dict(net.state_dict()), "step": first + steps, "arc": arc}


def wrong_call(rank: int) -> list[str]:
    """What is said of two backward passes in one step, and of a second job."""
    net = jobs.model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **jobs.LOSSLESS)
    said = []
    try:
        arc_topk.all_reduce([torch.zeros(3)])
    except arc_topk.ConfigError as error:
        said.append(str(error))
    jobs.loss_of(net, rank, 0).backward()
    optimizer.step()
    arc_topk.shutdown()
    try:
        arc_topk.summary()
    except arc_topk.ArcError as error:
        said.append(str(error))
    return said
