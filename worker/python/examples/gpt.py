"""A small GPT on real text, trained by several processes on this machine.

    python gpt.py --text corpus.txt --workers 4 --method arc --form ddp
    python gpt.py --text corpus.txt --workers 4 --method dense --form wrapper

Prints the validation loss and the bytes that each worker moved. Methods: dense, arc (both forms); gloo and powersgd, which are
PyTorch's own averaging and its PowerSGD hook (ddp only).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

import arc_topk


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def windows(data: torch.Tensor, count: int, context: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - context - 1, (count,), generator=generator)
    return torch.stack([data[start : start + context + 1] for start in starts.tolist()]).long()


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    kind = arc_topk.optim.AdamW if args.method == "arc" else torch.optim.AdamW
    return kind(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)


def averaged(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model and the optimizer, made to work with the other workers."""
    optimizer: Any = optimizer_for(model, args)
    settings: dict[str, Any] = {"compressor": "dense"} if args.method == "dense" else {"density": args.density}
    if args.form == "wrapper":
        return model, arc_topk.DistributedOptimizer(optimizer, model.named_parameters(), **settings)
    # PowerSGD's hook over gloo works with one bucket alone.
    ddp = DistributedDataParallel(model, bucket_cap_mb=2000 if args.method == "powersgd" else 25)
    if args.method == "powersgd":
        state = powersgd.PowerSGDState(None, matrix_approximation_rank=args.rank, start_powerSGD_iter=20)
        ddp.register_comm_hook(state, powersgd.powerSGD_hook)
    elif args.method != "gloo":
        arc_topk.register(ddp, **settings)
    return ddp, optimizer


def train(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = torch.frombuffer(bytearray(Path(args.text).read_bytes()), dtype=torch.uint8)
    split = int(0.9 * len(data))
    with group(args):
        rank = dist.get_rank() if args.form == "ddp" else arc_topk.init() or arc_topk.rank()
        net = GPT(args.context, args.width, args.layers, args.heads)
        model, optimizer = averaged(net, args)
        generator = torch.Generator().manual_seed(1000 * args.seed + rank)
        begun = time.perf_counter()
        for step in range(args.steps):
            warm = min(1.0, (step + 1) / 20)
            rate = args.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps)))
            for part in optimizer.param_groups:
                part["lr"] = rate
            optimizer.zero_grad()
            loss = loss_of(model, windows(data[:split], args.batch, args.context, generator))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if rank == 0 and (step + 1) % 50 == 0:
                print(f"step {step + 1}/{args.steps}  loss {loss.detach():.3f}", flush=True)
        seconds = time.perf_counter() - begun
        own = args.method in ("arc", "dense")
        summary = arc_topk.summary() if own else None
        with torch.no_grad():
            fixed = torch.Generator().manual_seed(7)
            losses = [loss_of(net, windows(data[split:], 16, args.context, fixed)) for _ in range(8)]
        return {
            "loss": float(torch.stack(losses).mean()),
            "megabytes": (summary.bytes_sent + summary.bytes_received) / 1e6 if summary else float("nan"),
            "compression": summary.compression if summary else float("nan"),
            "seconds": seconds,
        }


@contextlib.contextmanager
def group(args: argparse.Namespace) -> Any:
    if args.form == "ddp":
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        arc_topk.shutdown()
        if args.form == "ddp":
            dist.destroy_process_group()


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a text file")
    parser.add_argument("--method", choices=["arc", "dense", "gloo", "powersgd"], default="arc")
    parser.add_argument("--form", choices=["ddp", "wrapper"], default="ddp")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.2, help="of arc")
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--batch", type=int, default=4, help="windows per worker")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.method in ("gloo", "powersgd") and args.form != "ddp":
        parser.error(f"{args.method} is a hook of DistributedDataParallel: use --form ddp")
    result = arc_topk.local(train, args, workers=args.workers)[0]
    print(
        f"{args.method} ({args.form}): validation loss {result['loss']:.4f}, {result['megabytes']:.1f} MB per worker, "
        f"1/{result['compression']:.1f} of dense, {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
