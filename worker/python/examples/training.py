"""What the examples have in common: the ways of averaging gradients that they compare, and the loop.

The lines that matter to a script of your own are in :func:`averaged`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import loopback
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

import arc_topk

#: Ways of averaging: ours, and PyTorch's own (all-reduce over gloo, its bf16 hook, PowerSGD), which are DDP's alone.
METHODS = ("arc", "dense", "gloo", "bf16", "powersgd")
_DDP_ONLY = ("gloo", "bf16", "powersgd")

Batch = tuple[torch.Tensor, torch.Tensor]


class Task(Protocol):
    """A model and its data."""

    def model(self) -> nn.Module:
        """A model, the same on all workers after ``torch.manual_seed``."""
        ...

    def batch(self, generator: torch.Generator) -> Batch:
        """What a worker sees in a step."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """``loss`` on held-out data, and what else can be said."""
        ...


@dataclasses.dataclass
class Result:
    """How a run ended."""

    validation: dict[str, float]
    #: Bytes over a worker's own link, both ways: of the whole run, and a step after the warm-up.
    bytes: float
    bytes_per_step: float
    seconds: float


def density_of(text: str) -> tuple[str, float]:
    """``PATTERN=DENSITY``, as ``arc_topk.Config.densities`` has them."""
    pattern, _, density = text.rpartition("=")
    if not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=DENSITY")
    return pattern, float(density)


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, lr: float, batch: int) -> None:
    """Settings that all examples have, with this one's defaults."""
    add = parser.add_argument
    add("--method", choices=METHODS, default="arc", help="how gradients are averaged (default: arc)")
    add("--form", choices=["ddp", "wrapper"], default="ddp", help="of arc and dense (default: ddp)")
    add("--workers", type=int, default=4)
    add("--device", default="cpu", help="where models are, and arc compresses: cpu, or cuda, shared by all workers (default: cpu)")
    add("--density", type=float, default=0.2, help="of arc (default: 0.2)")
    add(
        "--densities",
        type=density_of,
        action="append",
        default=[],
        metavar="PATTERN=DENSITY",
        help="of arc, for the tensors whose names match; may be given several times: --densities '*embeddings*=0.02'",
    )
    add("--energy", type=float, default=1.0, help="of arc: the sketch's energy at which no more rows are sent (default: 1)")
    add("--selection", default="per-tensor", help="of rows: per-tensor, or pooled over a bucket's tensors (default: per-tensor)")
    add("--wire", default="int4", help="of arc's values, both ways: f32, bf16, f16, int8, int4 (default: int4)")
    add("--plain-adam", action="store_true", help="torch's AdamW with arc, instead of arc_topk.optim.AdamW")
    add("--rank", type=int, default=4, help="of PowerSGD (default: 4)")
    add("--warmup", type=int, default=20, help="steps of dense averaging before compression (default: 20)")
    add("--steps", type=int, default=steps, help=f"(default: {steps})")
    add("--lr", type=float, default=lr, help=f"(default: {lr})")
    add("--batch", type=int, default=batch, help=f"per worker (default: {batch})")
    add("--seed", type=int, default=0)


def averaged(net: nn.Module, optimizer: Any, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model and the optimizer, made to work with the other workers."""
    settings: dict[str, Any] = {"compressor": "dense"}
    if args.method == "arc":
        wire = {"wire_up": args.wire, "wire_down": args.wire}
        settings = {"density": args.density, "warmup_updates": args.warmup, "selection": args.selection, "device": args.device}
        settings |= wire | {"densities": dict(args.densities), "energy": args.energy}
    if args.form == "wrapper":
        return net, arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **settings)
    # PowerSGD's hook over gloo works with one bucket alone.
    # Buffers are constants here: what all-reduce sends of them in each step would be counted with the gradients.
    model = DistributedDataParallel(net, bucket_cap_mb=2000 if args.method == "powersgd" else 25, broadcast_buffers=False)
    if args.method == "powersgd":
        state = powersgd.PowerSGDState(
            None, matrix_approximation_rank=args.rank, start_powerSGD_iter=args.warmup, random_seed=args.seed
        )
        model.register_comm_hook(state, powersgd.powerSGD_hook)
    elif args.method == "bf16":
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif args.method != "gloo":
        arc_topk.register(model, **settings)
    return model, optimizer


def optimizer_for(net: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; with arc the one that knows how long a row was away."""
    catches_up = args.method == "arc" and not args.plain_adam
    kind = arc_topk.optim.AdamW if catches_up else torch.optim.AdamW
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return kind(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)


def rate(args: argparse.Namespace, step: int) -> float:
    """Learning rate: up for 20 steps, then along a cosine to a tenth."""
    return float(args.lr * min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps))))


def train(args: argparse.Namespace, make: Callable[[argparse.Namespace], Task]) -> Result:
    """What each worker does."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    task = make(args)
    with group(args):
        rank = dist.get_rank() if args.form == "ddp" else int(os.environ["RANK"])
        net = task.model().to(args.device)
        model, optimizer = averaged(net, optimizer_for(net, args), args)
        generator = torch.Generator().manual_seed(1000 * args.seed + rank)
        begun, counted = time.perf_counter(), {0: loopback.carried()}
        for step in range(args.steps):
            for part in optimizer.param_groups:
                part["lr"] = rate(args, step)
            optimizer.zero_grad()
            inputs, wanted = task.batch(generator)
            loss = task.loss(model, (inputs.to(args.device), wanted.to(args.device)))
            loss.backward()
            optimizer.step()
            counted[step + 1] = loopback.carried()
            if rank == 0 and (step + 1) % 50 == 0:
                print(f"step {step + 1}/{args.steps}  loss {loss.detach():.3f}", flush=True)
        seconds = time.perf_counter() - begun
        # Every byte of an all-reduce leaves one worker's link and enters another's; beside shards one of the two is a shard's.
        share = (2 if args.method in _DDP_ONLY else 1) / args.workers
        warm = min(args.warmup + 1, args.steps - 1)
        return Result(
            validation=task.validate(net.cpu()) if rank == 0 else {},
            bytes=share * (counted[args.steps] - counted[0]),
            bytes_per_step=share * (counted[args.steps] - counted[warm]) / (args.steps - warm),
            seconds=seconds,
        )


@contextlib.contextmanager
def group(args: argparse.Namespace) -> Iterator[None]:
    """The process group that DDP needs, and the end of it all in order."""
    if args.form == "ddp":
        dist.init_process_group("gloo")
    try:
        yield
        if args.form == "ddp":
            # PyTorch takes gloo's threads away with Python's lock in hand, and one may still wait for it to give back a tensor.
            dist.barrier()
    finally:
        arc_topk.shutdown()
        if args.form == "ddp":
            dist.destroy_process_group()


def run(parser: argparse.ArgumentParser, make: Callable[[argparse.Namespace], Task]) -> None:
    """An example's main program: a whole job on this machine."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parser.parse_args()
    if args.method in _DDP_ONLY and args.form != "ddp":
        parser.error(f"{args.method} is a hook of DistributedDataParallel: use --form ddp")
    if args.method == "powersgd" and args.warmup < 2:
        parser.error("PowerSGD with error feedback needs a --warmup of 2 steps at least")
    if args.steps <= args.warmup + 1:
        parser.error("bytes are counted after the warm-up: give more --steps, or a shorter --warmup")
    alone = loopback.isolate()
    result = arc_topk.local(train, args, make, workers=args.workers)[0]
    said = ", ".join(f"{name} {value:.4f}" for name, value in result.validation.items())
    print(
        f"{args.method} ({args.form}): validation {said}; over a worker's link, both ways, {result.bytes / 1e6:.1f} MB, "
        f"{result.bytes_per_step / 1e6:.3f} MB a step after the warm-up; {result.seconds:.0f} s"
    )
    if not alone:
        print("bytes are those of this machine's loopback: whatever else talks over it was counted, too")


def dataset(name: str) -> Path:
    """A data set that ``worker/data/fetch.py`` has put there."""
    cache = Path(os.environ.get("ARC_DATA_CACHE") or Path(__file__).resolve().parents[3] / ".data")
    path = cache / name
    if not path.exists():
        raise SystemExit(f"{path} is not there: `python3 worker/data/fetch.py` fetches it")
    return path
