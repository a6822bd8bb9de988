"""What averaging costs a worker beside the network: time in the hook, processor time and memory.

    python bench/overhead.py                       # all methods on the shapes of LLaMA-60M
    python bench/overhead.py --layers 2 --vocabulary 4000 --methods none,arc-0.2,gloo

Two workers and two shards on loopback, each method in processes of its own. Layers of the model stand side by side and see a few
vectors only, so that backward is cheap and averaging is most of a step. `none` trains each worker for itself: what it takes is
taken off the others' figures. Columns, of worker 0, medians of the steps measured:

    step        a whole training step
    push        in Exchange.push, all tensors together
    wait        in Exchange.finish, until all rounds had closed (compression that backward did not hide is in it)
    write       the rest of Exchange.finish: committing feedback state, writing the means
    compress    the worker's engine, beside the trainer or while it waits, and the commit
    ms/MB       push and write, for each MB of float32 gradient
    cpu ms/MB   processor time of the whole process, all threads, beyond `none`
    memory      peak resident memory beyond `none`, in sizes of the gradient
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shapes import SideBySide
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk

MEGABYTE = 1e6


class Times:
    """Adds up what calls of a function take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.perf_counter() - begun

    def take(self) -> float:
        """The sum, which begins anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclasses.dataclass
class Step:
    step: float
    cpu: float
    push: float = float("nan")
    wait: float = float("nan")
    write: float = float("nan")
    compress: float = float("nan")


class Watched:
    """An exchange whose calls are timed."""

    def __init__(self, exchange: arc_topk.Exchange) -> None:
        self.exchange = exchange
        self.push, self.finish = Times(exchange.push), Times(exchange.finish)
        exchange.push, exchange.finish = self.push, self.finish  # type: ignore[method-assign, assignment]
        self.before = dataclasses.replace(exchange.summary)

    def taken(self, step: float, cpu: float) -> Step:
        """The step that ended."""
        now = self.exchange.summary
        wait = now.wait_seconds - self.before.wait_seconds
        compress = now.compress_seconds - self.before.compress_seconds
        self.before = dataclasses.replace(now)
        return Step(step, cpu, self.push.take(), wait, self.finish.take() - wait, compress)


def peak_bytes() -> int:
    """The most memory that was resident since :func:`reset_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def worker(method: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ["RANK"]))
    inputs = [torch.randn(4, max(args.hidden, args.intermediate)) for _ in range(args.warmup + args.steps)]
    model = SideBySide(args.hidden, args.intermediate, args.layers, args.vocabulary)
    net, optimizer, watched = averaged(model, method)
    steps = []
    for number, x in enumerate(inputs):
        if number == args.warmup:
            reset_peak()
        begun, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        net(x).backward()
        optimizer.step()
        taken = time.perf_counter() - begun, time.process_time() - cpu
        step = Step(*taken) if watched is None else watched.taken(*taken)
        if number >= args.warmup:
            steps.append(step)
    peak = peak_bytes()
    arc_topk.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()
    medians = {field.name: statistics.median(getattr(step, field.name) for step in steps) for field in dataclasses.fields(Step)}
    return {**medians, "peak": peak, "gradient": model.gradient_bytes}


def averaged(model: nn.Module, method: str) -> tuple[nn.Module, Any, Watched | None]:
    """The model and its optimizer, with the other worker's."""
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    kind, _, more = method.partition("-")
    if kind == "none":
        return model, optimizer, None
    ddp = kind == "gloo" or more.endswith("ddp")
    net = model
    if ddp:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo")
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if kind == "gloo":
        return net, optimizer, None
    settings: dict[str, Any] = {"compressor": "dense"} if kind == "dense" else {"density": float(more.split("-")[0])}
    settings |= {"warmup_updates": 0}
    if ddp:
        return net, optimizer, Watched(arc_topk.register(net, **settings))
    optimizer = arc_topk.DistributedOptimizer(optimizer, model.named_parameters(), broadcast=False, **settings)
    return net, optimizer, Watched(optimizer.exchange)


def row(method: str, got: dict[str, Any], none: dict[str, Any]) -> str:
    megabytes = got["gradient"] / MEGABYTE
    cells = [f"{1e3 * got[name]:.0f}" for name in ("step", "push", "wait", "write", "compress")]
    cells.append(f"{1e3 * (got['push'] + got['write']) / megabytes:.2f}")
    cells.append(f"{1e3 * (got['cpu'] - none['cpu']) / megabytes:.2f}")
    cells.append(f"{(got['peak'] - none['peak']) / got['gradient']:.2f}")
    return " | ".join(["", method, *(cell.replace("nan", "") for cell in cells), ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="arc-0.05,arc-0.2,arc-0.4,arc-0.2-ddp,dense,gloo")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    methods = ["none", *(method for method in args.methods.split(",") if method != "none")]
    none: dict[str, Any] = {}
    for method in methods:
        got = arc_topk.local(worker, method, args, workers=2, shards=2)[0]
        if not none:
            none = got
            print(f"{got['gradient'] / MEGABYTE:.0f} MB of gradient; times in ms per step\n")
            print("| method | step | push | wait | write | compress | ms/MB | cpu ms/MB | memory |")
            print("|---|---|---|---|---|---|---|---|---|")
        print(row(method, got, none), flush=True)


if __name__ == "__main__":
    main()
