"""Workers whose steps take closures, that lose their place, or that tell how they are; see test_lifecycle.py."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
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


def asked_to_end(rank: int, page: str) -> dict[str, Any]:
    """Worker 1 gets SIGTERM in its sixth step and leaves; worker 0 trains on alone."""
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    os.environ["ARC_LEAVE_ON_SIGTERM"] = "1"
    net = jobs.model()
    optimizer: Any = arc_topk.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.01), net.named_parameters(), **jobs.SPARSE
    )
    status, sizes = 0, []
    try:
        for step in range(12):
            optimizer.zero_grad()
            jobs.loss_of(net, rank, step).backward()
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            optimizer.step()
            sizes.append(arc_topk.world_size())
    except SystemExit as error:
        status = int(str(error.code))
    lost = next(line for line in read(page + "metrics").splitlines() if line.startswith("arc_lost_workers_total"))
    arc_topk.shutdown()
    del os.environ["ARC_LEAVE_ON_SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as it was"
    return {"status": status, "sizes": sizes, "lost": float(lost.split()[-1])}


def leaves_sigterm_alone(_: int, asked: bool) -> bool:
    """Whether joining leaves SIGTERM as the script has it: with a handler of its own, or, unasked, with none."""

    def own(*_: object) -> None:
        pass

    kept: Any = own if asked else signal.SIG_DFL
    signal.signal(signal.SIGTERM, kept)
    if asked:
        os.environ["ARC_LEAVE_ON_SIGTERM"] = "1"
    try:
        net = jobs.model()
        arc_topk.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), net.named_parameters(), **jobs.SPARSE)
        return signal.getsignal(signal.SIGTERM) == kept
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.pop("ARC_LEAVE_ON_SIGTERM", None)
        arc_topk.shutdown()


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


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """What the package warns of."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("arc_topk").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("arc_topk").removeHandler(handler)


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps, by parameter and name."""
    return {f"{at}/{name}": value for at, own in state["state"].items() for name, value in own.items()}


def await_rank(exchange: arc_topk.Exchange, replica: Any, rank: int) -> None:
    """Stands between two steps until this rank has joined, with a state that may be this worker's."""
    while rank not in exchange.session.members():
        time.sleep(0.01)
        replica.attend()


def comes_apart(rank: int, elastic: bool) -> dict[str, Any]:
    """Three workers of 60 steps; the parameters of rank 1 become others, and shard 0 finds out."""
    net = jobs.model()
    optimizer: Any = arc_topk.optim.AdamW(net.parameters(), lr=0.01)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), elastic=elastic, digest_every=4, **jobs.SPARSE)
    exchange, passed = optimizer.exchange, []
    residuals: dict[str, torch.Tensor] = {}
    with warnings() as said:
        while exchange.step < 60:
            step = exchange.step
            passed.append(step)
            if step == 20 and rank != 1 and elastic:
                await_rank(exchange, optimizer._arc.replica, 3)
            optimizer.zero_grad()
            try:
                jobs.loss_of(net, rank, step).backward()
                optimizer.step()
            except arc_topk.Superseded as error:
                return {"error": str(error), "values": jobs.values(net)}
            if rank == 1 and step == 5:
                with torch.no_grad():
                    next(net.parameters()).add_(1.0)
            if exchange.rank != rank and not residuals:
                residuals = exchange.state_dict()["arrays"]
    arc_topk.shutdown()
    got = {"values": jobs.values(net), "state": flat(optimizer.state_dict()), "passed": passed, "said": said}
    return got | {"rank": exchange.rank, "residuals": residuals}


def stands_still(rank: int, directory: str) -> dict[str, Any]:
    """Rank 0 stops rank 2 for so long that the shards no longer have the answers that it misses."""
    net = jobs.model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **jobs.SPARSE)
    exchange, pid = optimizer.exchange, Path(directory) / "pid"
    if rank == 2:
        pid.write_text(str(os.getpid()))
    with warnings() as said:
        while exchange.step < 80:
            step = exchange.step
            if rank == 0 and step == 10:
                os.kill(int(pid.read_text()), signal.SIGSTOP)
            if rank == 0 and step == 40:
                os.kill(int(pid.read_text()), signal.SIGCONT)
            if rank < 2 and step == 60:
                await_rank(exchange, optimizer._arc.replica, 3)
            optimizer.zero_grad()
            jobs.loss_of(net, rank, step).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    arc_topk.shutdown()
    return {"values": jobs.values(net), "rank": exchange.rank, "said": said}


def local_rounds(rank: int, last: int, marker: str, spoils: bool) -> dict[str, Any]:
    """Rounds of four local steps. A third worker comes when two are under way; then the state of rank 1 may become another."""
    under_way, sync_every = Path(marker), 4
    if rank == 2:
        while not under_way.exists():
            time.sleep(0.01)
    net = jobs.model(rank)
    inner: Any = torch.optim.AdamW(net.parameters(), lr=0.003)
    arc_topk.init(world_size=2)
    settings: dict[str, Any] = {"density": 0.5, "dense_below_elements": 16, "digest_every": 2}
    optimizer = arc_topk.LocalSGD(inner, net.named_parameters(), sync_every, **settings)
    exchange, averager = optimizer.exchange, optimizer._arc_local
    first, counts = exchange.step, sorted({int(value) for name, value in flat(optimizer.state_dict()).items() if "step" in name})
    at, spoiled = 0, False
    with warnings() as said:
        while exchange.step < last:
            optimizer.zero_grad()
            jobs.loss_of(net, rank, at).backward()
            at += 1
            before = exchange.step
            optimizer.step()
            if exchange.step == before:
                continue
            if exchange.step == 5:
                under_way.touch()
            if rank < 2 and before == 10:
                await_rank(exchange, averager._replica, 2)
            if rank == 1 and spoils and before >= 12 and not spoiled:
                spoiled = True
                with torch.no_grad():
                    averager._common[0].add_(1.0)
            if rank != 1 and spoils and before == 30:
                await_rank(exchange, averager._replica, 3)
    outer = flat(optimizer.outer.state_dict())
    arc_topk.shutdown()
    got = {"first": first, "counts": counts, "values": jobs.values(net), "outer": outer}
    return got | {"rank": exchange.rank, "said": said}


def read(address: str) -> str:
    """A page of a shard."""
    with urllib.request.urlopen(address, timeout=20) as page:
        return str(page.read().decode())


def tells(rank: int, page: str, form: str) -> dict[str, Any]:
    """Rank 0 says its losses; both tell how long steps take. The status once both have told all that they can."""
    with jobs.process_group() if form == "ddp" else contextlib.nullcontext():
        net = jobs.model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
        if form == "ddp":
            net_or_ddp: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(net)
            arc_topk.register(net_or_ddp, **jobs.SPARSE)
        else:
            net_or_ddp = net
            optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **jobs.SPARSE)
        losses = []
        for step in range(5):
            optimizer.zero_grad()
            loss = jobs.loss_of(net_or_ddp, rank, step)
            loss.backward()
            if rank == 0:
                arc_topk.report(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
        reports: list[Any] = []
        while rank == 0 and [report and report["step"] for report in reports] != [4, 4]:
            status = json.loads(read(page + "status"))
            reports = [member["report"] for member in status["members"]]
            time.sleep(0.01)
        metrics = read(page + "metrics")
        # Gauges follow in a moment.
        while rank == 0 and "arc_training_loss 0\n" in metrics:
            time.sleep(0.01)
            metrics = read(page + "metrics")
        # Nobody leaves before rank 0 has seen both.
        arc_topk.exchange().begin()
        arc_topk.exchange().finish([])
        arc_topk.shutdown()
        return {"losses": losses, "reports": reports, "metrics": metrics}


class Marks(logging.Handler):
    """Makes a file when something is said."""

    def __init__(self, words: str, file: Path) -> None:
        super().__init__(logging.WARNING)
        self.words, self.file = words, file

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            self.file.touch()


def waits_for_a_place(rank: int, directory: str) -> dict[str, Any]:
    """Two train in a job that is full; when a third one has said that it waits, one leaves."""
    under_way, waits = Path(directory) / "under-way", Path(directory) / "waits"
    logger, marks = logging.getLogger("arc_topk"), Marks("the job is full, with 2 workers", waits)
    if rank == 2:
        while not under_way.exists():
            time.sleep(0.01)
        logger.addHandler(marks)
    arc_topk.init(world_size=2)
    net = jobs.model(rank)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **jobs.SPARSE)
    logger.removeHandler(marks)
    exchange = optimizer.exchange
    first = exchange.step
    while exchange.step < first + 10:
        optimizer.zero_grad()
        jobs.loss_of(net, rank, exchange.step).backward()
        optimizer.step()
    under_way.touch()
    while not waits.exists():
        time.sleep(0.01)
    if rank == 0:
        await_rank(exchange, optimizer._arc.replica, 2)
    while rank != 1 and exchange.step < 40:
        optimizer.zero_grad()
        jobs.loss_of(net, rank, exchange.step).backward()
        optimizer.step()
    arc_topk.shutdown()
    return {"values": jobs.values(net), "first": first}
