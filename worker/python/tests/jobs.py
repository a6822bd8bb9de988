"""What worker processes do; each returns plain numbers and tensors."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk import _auto_hook
from arc_topk._auto import Choice, Way

DENSE: dict[str, Any] = {"compressor": "dense", "wire_dense": "f32"}
# Everything travels, and nothing is rounded on the way.
LOSSLESS: dict[str, Any] = {
    "density": 1.0,
    "warmup_updates": 0,
    "wire_up": "f32",
    "wire_down": "f32",
    "wire_warmup": "f32",
    "dense_below_elements": 16,
}
SPARSE = LOSSLESS | {"density": 0.25}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(16, 12, generator=generator)
    return inputs, torch.sin(inputs[:, :4] * 2.0)


def loss_of(net: nn.Module, rank: int, step: int) -> torch.Tensor:
    inputs, wanted = batch(rank, step)
    return nn.functional.mse_loss(net(inputs), wanted)


def step(optimizer: Any, loss: torch.Tensor, scaler: Any | None) -> None:
    """Backward and the optimizer's step, by the scaler if there is one."""
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def values(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


# The process groups of the job before. PyTorch takes them away with Python's lock in hand, and waits for their threads, which may
# wait for that lock to give back a tensor of a gathering that was just over: a deadlock. By the next job they have done so.
_groups: list[Any] = []


@contextlib.contextmanager
def process_group() -> Any:
    """Gloo's."""
    _groups.clear()
    dist.init_process_group("gloo")
    try:
        yield
        dist.barrier()
    finally:
        arc_topk.shutdown()
        every: Any = dist.distributed_c10d._world
        _groups.extend(every.pg_map)
        dist.destroy_process_group()


def machine_of(form: str) -> Any:
    """With the form ``machines`` every two processes are one worker."""
    return dist.new_subgroups(2)[0] if form == "machines" else None


def mode_of(form: str) -> dict[str, Any]:
    """With the form ``auto`` each step goes the way that is faster."""
    return {"mode": "auto"} if form == "auto" else {}


def ddp(
    rank: int, settings: dict[str, Any] | None, steps: int, bucket_mb: float = 25.0, seen: list[arc_topk.Exchange] | None = None
) -> list[torch.Tensor]:
    """Parameters after some steps; ``settings`` of None: DDP's own averaging. The exchange is appended to ``seen``."""
    with process_group():
        net = model()
        wrapped: nn.Module = DistributedDataParallel(net, bucket_cap_mb=bucket_mb)
        if settings is not None:
            exchange = arc_topk.register(wrapped, **settings)
            if seen is not None:
                seen.append(exchange)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(wrapped, rank, step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        return values(net)


def ddp_by_itself(rank: int, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """The same with ``mode="auto"``, and which ways it went."""
    seen: list[arc_topk.Exchange] = []
    got = {"values": ddp(rank, settings, steps, seen=seen)}
    summary = seen[0].summary
    return got | {"through shards": summary.steps, "all-reduced": summary.all_reduced, "choice": summary.choice}


def auto_unlike(rank: int) -> dict[str, str]:
    """What workers are told that do not all choose their way, or that begin at different updates."""
    told = {}
    # The one that is not refused waits for another in its place.
    arc_topk.init(join_timeout=3.0)
    with process_group():
        for what, mode, update in [("mode", "auto" if rank == 0 else "arc", 0), ("start", "auto", rank)]:
            net = DistributedDataParallel(model())
            state = {"step": 0, "update": update, "arrays": {}}
            try:
                arc_topk.register(net, state=state if update else None, mode=mode, feedback="none")
            except (arc_topk.ConfigError, arc_topk.ArcError) as error:
                told[what] = str(error)
            arc_topk.shutdown()
            dist.barrier()
    return told


def wrapper(rank: int, settings: dict[str, Any], steps: int, seeds_differ: bool = False) -> list[torch.Tensor]:
    """The same by DistributedOptimizer, without a process group."""
    net = model(rank if seeds_differ else 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **settings)
    assert isinstance(optimizer, torch.optim.SGD)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    arc_topk.shutdown()
    return values(net)


def reduced(rank: int, steps: int) -> list[list[torch.Tensor]]:
    got = []
    for step in range(steps):
        tensors = [torch.full((40, 3), float(rank + step)), torch.arange(5.0) * rank]
        arc_topk.all_reduce(tensors, **DENSE)
        got.append(tensors)
        if step == 0:
            # The other one has begun no step that this one can do without.
            assert (arc_topk.rank(), arc_topk.world_size()) == (rank, 2)
    summary = arc_topk.summary()
    assert summary.steps == steps and summary.bytes_sent > 0
    arc_topk.shutdown()
    return got


class Scripted:
    """In the place of :class:`Auto`: some steps through the shards, then the group is chosen."""

    def __init__(self, steps: int) -> None:
        self.way = Way.SHARDS
        self.left = steps

    def begin(self, _update: int, _seconds: float | None) -> Choice | None:
        self.left -= 1
        if self.left != -1:
            return None
        self.way = Way.GROUP
        return Choice(self.way, "because the script says so")


def both_ways(rank: int, steps: int) -> dict[str, Any]:
    """Sums of gradients, through the shards and then by the process group, whose first step brings a NaN."""
    weight = torch.nn.Parameter(torch.zeros(32, 8))
    net = nn.Module()
    net.register_parameter("weight", weight)
    net.forward = lambda given: (weight * given).sum()
    dense = torch.zeros(32, 8)
    got: dict[str, Any] = {"rows": []}

    def sum_up(wrapped: nn.Module, step: int, spoiled: bool = False) -> None:
        given = [torch.randn(32, 8, generator=torch.Generator().manual_seed(10 * step + of)) for of in range(2)]
        net.zero_grad()
        wrapped(given[rank] * (math.nan if spoiled and rank == 0 else 1.0)).backward()
        assert weight.grad is not None
        if torch.isfinite(weight.grad).all():
            weight.data -= weight.grad
            dense.sub_(sum(given) / 2)

    def held(exchange: arc_topk.Exchange) -> float:
        return sum(float(values.abs().sum()) for values in exchange.state_dict()["arrays"].values())

    with process_group(), mock.patch.object(_auto_hook, "Auto", return_value=Scripted(steps)):
        wrapped = DistributedDataParallel(net)
        exchange = arc_topk.register(wrapped, **SPARSE, mode="auto")
        for step in range(steps):
            sum_up(wrapped, step)
        got["rows"].append(arc_topk.fresh_rows(weight) is None)
        got |= {"before": weight.detach().clone(), "dense_before": dense.clone(), "held_before": held(exchange)}
        got["held_again"] = got["held_before"]
        sum_up(wrapped, steps, spoiled=True)
        got["held_after_nan"] = held(exchange)
        sum_up(wrapped, steps + 1)
        got["held"] = held(exchange)
        sum_up(wrapped, steps + 2)
        got["rows"].append(arc_topk.fresh_rows(weight) is None)
        got |= {"after": weight.detach().clone(), "dense_after": dense.clone(), "all_reduced": exchange.summary.all_reduced}
    return got


def accumulated(rank: int, form: str, passes: int) -> list[torch.Tensor]:
    """Two steps, each of some backward passes."""
    with process_group() if form != "wrapper" else contextlib.nullcontext():
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        if form != "wrapper":
            net_or_ddp: nn.Module = DistributedDataParallel(net)
            arc_topk.register(net_or_ddp, local_group=machine_of(form), **LOSSLESS)
            no_sync: Any = net_or_ddp.no_sync
        else:
            net_or_ddp = net
            optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **LOSSLESS)
            no_sync = optimizer.no_sync
        for step in range(2):
            optimizer.zero_grad()
            for at in range(passes):
                with no_sync() if at + 1 < passes else contextlib.nullcontext():
                    (loss_of(net_or_ddp, rank, passes * step + at) / passes).backward()
            optimizer.step()
        arc_topk.shutdown()
        return values(net)


def overflow(rank: int, form: str) -> dict[str, Any]:
    """Mixed precision whose gradients overflow on one worker in one step."""
    with process_group() if form != "wrapper" else contextlib.nullcontext():
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        if form != "wrapper":
            net_or_ddp: nn.Module = DistributedDataParallel(net)
            exchange = arc_topk.register(net_or_ddp, scaler=scaler, local_group=machine_of(form), **SPARSE, **mode_of(form))
        else:
            net_or_ddp = net
            optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), scaler=scaler, **SPARSE)
            exchange = optimizer.exchange
        seen = []
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(net_or_ddp, rank, step)
            if step == 3 and rank == 1:
                loss = loss * float("inf")
            before, kept = values(net), exchange.state_dict()["arrays"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            after = exchange.state_dict()["arrays"]
            moved = any(not torch.equal(a, b) for a, b in zip(before, values(net), strict=True))
            residual = any(not torch.equal(kept[name], after[name]) for name in kept)
            seen.append((moved, residual, float(scaler.get_scale())))
        arc_topk.shutdown()
        return {"seen": seen, "values": values(net), "skipped": exchange.summary.skipped}


def caught_up(rank: int, steps: int) -> dict[str, Any]:
    """Training with catch-up AdamW, and which rows of the first weight came."""
    net = model()
    optimizer = arc_topk.optim.AdamW(net.parameters(), lr=0.01)
    settings = SPARSE | {"warmup_updates": 2}
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **settings)
    fresh, losses = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, rank, 0)
        loss.backward()
        fresh.append(arc_topk.fresh_rows(next(net.parameters())))
        optimizer.step()
        losses.append(float(loss.detach()))
    arc_topk.shutdown()
    return {"values": dict(net.state_dict()), "fresh": fresh, "loss": losses}


def wrapper_unclipped(rank: int, settings: dict[str, Any], steps: int) -> dict[str, torch.Tensor]:
    """Plain SGD by the wrapper."""
    net = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **settings)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        optimizer.step()
    arc_topk.shutdown()
    return dict(net.state_dict())


def vectors(rank: int, rounds: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The gradients of a golden vector through the low-level call; results, rows and state."""
    names = [tensor["name"] for tensor in rounds["tensors"]]
    shapes = [tensor["shape"] for tensor in rounds["tensors"]]
    results, rows = [], []
    for gradients in rounds["gradients"]:
        own = zip(names, gradients[rank], shapes, strict=True)
        tensors = {name: torch.tensor(values, dtype=torch.float32).reshape(shape) for name, values, shape in own}
        arc_topk.all_reduce(tensors, **settings)
        results.append([tensor.flatten() for tensor in tensors.values()])
        rows.append([arc_topk.exchange().fresh_rows(index) for index in range(len(names))])
    arrays = arc_topk.exchange().state_dict()["arrays"]
    arc_topk.shutdown()
    return {"results": results, "rows": rows, "arrays": arrays}


def at_home(steps: int) -> tuple[int, int, list[torch.Tensor]]:
    """A worker of ``arc_topk.local``."""
    net = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), density=0.5)
    rank, world = arc_topk.rank(), arc_topk.world_size()
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        optimizer.step()
    return rank, world, values(net)


def fails_at_home() -> float:
    """One of two workers fails before it joins."""
    return 1.0 / (1 - int(os.environ["RANK"]))


def local_steps(rank: int, sync_every: int, rounds: int) -> dict[str, Any]:
    """Local steps, and an outer optimizer that takes the mean as it is."""
    net = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = arc_topk.LocalSGD(
        optimizer, net.named_parameters(), sync_every, lambda common: torch.optim.SGD(common, lr=1.0), **LOSSLESS
    )
    for step in range(sync_every * rounds):
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        optimizer.step()
    steps = arc_topk.summary().steps
    arc_topk.shutdown()
    return {"values": values(net), "steps": steps}


def local_diloco(rank: int, steps: int) -> dict[str, Any]:
    """DiLoCo with its defaults, compressed."""
    net = model(rank)
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.003)
    optimizer = arc_topk.LocalSGD(optimizer, net.named_parameters(), 20, density=0.25, dense_below_elements=16)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, rank, step)
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            losses.append(float(loss_of(net, 7, 7).detach()))
    arc_topk.shutdown()
    return {"values": values(net), "losses": losses}


def elastic(rank: int, last: int, marker: str) -> dict[str, Any]:
    """Two workers train; a third one comes when they are under way, with other parameters, and goes on with them."""
    under_way = Path(marker)
    if rank == 2:
        while not under_way.exists():
            time.sleep(0.01)
    net = model(rank)
    optimizer: Any = arc_topk.optim.AdamW(net.parameters(), lr=0.01)
    arc_topk.init(world_size=2)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **SPARSE)
    first = optimizer.exchange.step
    world = set()
    while optimizer.exchange.step < last:
        step = optimizer.exchange.step
        optimizer.zero_grad()
        loss_of(net, rank, step).backward()
        optimizer.step()
        if step == 5:
            under_way.touch()
        world.add(arc_topk.world_size())
        # Those that are there wait for the newcomer, which needs some time to come.
        if step == 20 and rank < 2:
            while arc_topk.world_size() < 3:
                time.sleep(0.01)
                optimizer._arc.replica.attend()
    moments = {f"{at}/{name}": value for at, state in optimizer.state_dict()["state"].items() for name, value in state.items()}
    arc_topk.shutdown()
    return {"first": first, "values": dict(net.state_dict()), "worlds": sorted(world), "moments": moments}
