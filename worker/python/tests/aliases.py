"""What worker processes do where memory, or an optimizer's step, is used by more than one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import arc_topk
import jobs


class Shared(nn.Module):
    """Autograd gives several gradients of this model the same memory, part of which its backward still reads; not if ``apart``."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        torch.manual_seed(0)
        self.below = nn.Linear(12, 32)
        self.place = nn.Parameter(torch.randn(32))
        self.left, self.right = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))
        self.above = nn.Linear(32, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        place, left, right = self.place[None], self.left.view(-1), self.right.view(-1)
        if self.apart:
            # Each gradient is a product of its own then.
            place, left, right = place * 1.0, left * 1.0, right * 1.0
        placed, both = self.below(inputs) + place, left + right
        return self.above(torch.tanh(placed) * both)


def trained(rank: int, apart: bool, scaled: bool) -> list[torch.Tensor]:
    """Parameters after some steps of sparse training on one sample a step."""
    net = Shared(apart)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler: Any = torch.amp.grad_scaler.GradScaler("cpu", init_scale=64.0) if scaled else None
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), scaler=scaler, **jobs.SPARSE)
    for step in range(6):
        inputs, wanted = jobs.batch(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(inputs[:1]), wanted[:1])
        jobs.step(optimizer, loss, scaler)
    arc_topk.shutdown()
    return jobs.values(net)


def overlapping(_rank: int) -> str:
    """What is said of tensors that lie in one another."""
    whole = torch.ones(64)
    try:
        arc_topk.all_reduce([whole, whole[16:48]], compressor="dense")
    except arc_topk.ConfigError as error:
        return str(error)
    return "nothing"


def broken_off(rank: int) -> list[bool]:
    """Whether what was kept back is the same after a call that failed, whose tensors then change, and means still come."""
    rows = torch.arange(64.0)[:, None] * (rank + 1) + torch.zeros(64, 32)
    arc_topk.all_reduce([rows.clone(), rows.clone()], **jobs.SPARSE)
    exchange = arc_topk.exchange()
    before = exchange.state_dict()
    whole = torch.ones(96, 32)
    try:
        arc_topk.all_reduce([whole[:64], whole[32:]], **jobs.SPARSE)
    except arc_topk.ConfigError:
        whole.fill_(float("nan"))
    after = exchange.state_dict()
    same = [torch.equal(before["arrays"][name], after["arrays"][name]) for name in before["arrays"]]
    kept_back = any(bool(values.any()) for values in before["arrays"].values())
    means = [torch.zeros(64, 32), torch.zeros(64, 32)]
    arc_topk.all_reduce(means, **jobs.SPARSE)
    arc_topk.shutdown()
    return [*same, kept_back, after["step"] == before["step"], bool(means[0].any()), bool(means[0].isfinite().all())]


def hooks(_rank: int) -> int:
    """How often a hook of the optimizer's step is called, after its state was loaded."""
    net = jobs.model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **jobs.LOSSLESS)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    optimizer.load_state_dict(optimizer.state_dict())
    jobs.loss_of(net, 0, 0).backward()
    optimizer.step()
    return len(called)


def local_rows(_rank: int) -> list[bool]:
    """Which rows local steps of catch-up AdamW move after a round that brought few."""
    net = jobs.model()
    optimizer: Any = arc_topk.optim.AdamW(net.parameters(), lr=0.01)
    optimizer = arc_topk.LocalSGD(optimizer, net.named_parameters(), sync_every=2, density=0.1, warmup_updates=0)
    for step in range(5):
        before = jobs.values(net)[0]
        optimizer.zero_grad()
        jobs.loss_of(net, 0, step).backward()
        optimizer.step()
    moved = (jobs.values(net)[0] != before).any(dim=1)
    return [bool(row) for row in moved]
