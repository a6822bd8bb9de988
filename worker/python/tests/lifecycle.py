"""Workers whose steps take closures, that lose their place, or that tell how they are; see test_lifecycle.py."""

from __future__ import annotations

from typing import Any

import torch

import arc_topk
import jobs


def by_closure(rank: int, kind: str, closures: bool, overflow_at: int | None = None) -> dict[str, Any]:
    """Six steps, by closures or without; at one of them a gradient of rank 1 is not finite."""
    net = jobs.model()
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "ours": arc_topk.optim.AdamW}[kind]
    optimizer: Any = arc_topk.DistributedOptimizer(make(net.parameters(), lr=0.01), net.named_parameters(), **jobs.SPARSE)
    moved, losses = [], []
    for step in range(6):

        def loss(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            value = jobs.loss_of(net, rank, step)
            if step == overflow_at and rank == 1:
                value = value * float("inf")
            value.backward()
            return value

        before = jobs.values(net)
        came = optimizer.step(loss) if closures else (loss(), optimizer.step())[0]
        losses.append(float(came.detach()))
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, jobs.values(net), strict=True)))
    state = optimizer.state_dict()["state"]
    counts = sorted({float(own["step"]) for own in state.values() if "step" in own})
    skipped = optimizer.exchange.summary.skipped
    arc_topk.shutdown()
    return {"values": jobs.values(net), "moved": moved, "losses": losses, "skipped": skipped, "counts": counts}


class Twice(torch.optim.SGD):
    """An optimizer that looks at its gradient twice a step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def twice(rank: int) -> str:
    """What is said of an optimizer that calls its closure twice."""
    net = jobs.model()
    optimizer: Any = arc_topk.DistributedOptimizer(Twice(net.parameters(), lr=0.01), net.named_parameters(), **jobs.SPARSE)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = jobs.loss_of(net, rank, 0)
        value.backward()
        return value

    try:
        optimizer.step(loss)
    except arc_topk.ConfigError as error:
        return str(error)
    finally:
        arc_topk.shutdown()
    return ""


def scheduled(rank: int, early: bool) -> dict[str, Any]:
    """A scheduler that is made before the optimizer is wrapped, or after; the second of four steps is skipped by all."""
    net = jobs.model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    halves = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if early else None
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **jobs.SPARSE)
    halves = halves or torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(4):
        optimizer.zero_grad()
        (jobs.loss_of(net, rank, step) * (float("nan") if step == 1 else 1.0)).backward()
        optimizer.step()
        halves.step()
    arc_topk.shutdown()
    return {"values": jobs.values(net), "rate": optimizer.param_groups[0]["lr"]}
