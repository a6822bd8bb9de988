"""What worker processes do that are several to a machine; see test_machines.py. Every two ranks are a machine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import arc_topk
import jobs

CATCH_UP: dict[str, Any] = {"density": 0.2, "wire_up": "int4", "wire_down": "int4", "warmup_updates": 2, "dense_below_elements": 16}


def averaged(rank: int, settings: dict[str, Any], steps: int, bucket_mb: float) -> list[torch.Tensor]:
    """As jobs.ddp does it."""
    with jobs.process_group():
        net = jobs.model()
        wrapped = DistributedDataParallel(net, bucket_cap_mb=bucket_mb)
        arc_topk.register(wrapped, local_group=jobs.machine_of("machines"), **settings)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for step in range(steps):
            optimizer.zero_grad()
            jobs.loss_of(wrapped, rank, step).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        return jobs.values(net)


def _outcome(net: torch.nn.Module, optimizer: Any, rows: list[Any]) -> dict[str, Any]:
    summary = arc_topk.summary()
    return {
        "values": jobs.values(net),
        "rows": rows,
        "sent": summary.bytes_sent,
        "steps": summary.steps,
        "place": (arc_topk.rank(), arc_topk.world_size()),
        "saved": {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "arc": arc_topk.exchange().state_dict()},
    }


def caught_up(rank: int, steps: int, saved: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Catch-up AdamW on two machines, from what an earlier run left if there is anything."""
    with jobs.process_group():
        net = jobs.model()
        optimizer = arc_topk.optim.AdamW(net.parameters(), lr=0.01)
        state = None
        if saved is not None:
            net.load_state_dict(saved[rank]["net"])
            optimizer.load_state_dict(saved[rank]["optimizer"])
            state = saved[rank]["arc"]
        wrapped = DistributedDataParallel(net, bucket_cap_mb=0.001)
        exchange = arc_topk.register(wrapped, local_group=jobs.machine_of("machines"), state=state, **CATCH_UP)
        rows = []
        for _ in range(steps):
            optimizer.zero_grad()
            jobs.loss_of(wrapped, rank, exchange.step).backward()
            rows.append(arc_topk.fresh_rows(net.get_parameter("2.weight")))
            optimizer.step()
        return _outcome(net, optimizer, rows)


def of_means(rank: int, steps: int) -> dict[str, Any]:
    """The same by two workers, each with the mean gradient of a machine's two processes."""
    net = jobs.model()
    optimizer: Any = arc_topk.optim.AdamW(net.parameters(), lr=0.01)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **CATCH_UP)
    rows = []
    for step in range(steps):
        optimizer.zero_grad()
        with optimizer.no_sync():
            (jobs.loss_of(net, 2 * rank, step) / 2).backward()
        (jobs.loss_of(net, 2 * rank + 1, step) / 2).backward()
        rows.append(arc_topk.fresh_rows(net.get_parameter("2.weight")))
        optimizer.step()
    return _outcome(net, optimizer, rows)


def refused(_: int) -> list[str]:
    """What is said of groups of one and of two processes, of a group that is not known, and of mode auto."""
    with jobs.process_group():
        wrapped = DistributedDataParallel(jobs.model())
        own, _ = dist.new_subgroups_by_enumeration([[0], [1, 2]])
        said = []
        for group, mode in ((own, "arc"), ("node", "arc"), (own, "auto")):
            try:
                arc_topk.register(wrapped, local_group=group, mode=mode)
            except arc_topk.ConfigError as error:
                said.append(str(error))
        return said


def leader_fails(rank: int) -> list[str]:
    """What is said on both processes of a machine when their leader cannot join, and when it fails in a step."""
    with jobs.process_group():
        wrapped = DistributedDataParallel(jobs.model(), bucket_cap_mb=0.001)
        group = dist.new_subgroups(2)[0]
        said = []
        try:
            arc_topk.register(wrapped, local_group=group, density=7.0)
        except arc_topk.ConfigError as error:
            said.append(str(error))
        exchange: Any = arc_topk.register(wrapped, local_group=group, **jobs.SPARSE)
        jobs.loss_of(wrapped, rank, 0).backward()

        def push(*_: Any) -> None:
            raise arc_topk.JobEnded("as a test has it")

        exchange.push = push
        try:
            jobs.loss_of(wrapped, rank, 1).backward()
        except RuntimeError as error:
            # The future passes on what an error says, not which it is.
            said.append(str(error))
        return said
