"""A DistributedDataParallel script with the three lines in it, and a checkpoint that holds the feedback state as well.

    arc-worker local --workers 2 --restart never -- python quickstart.py       # shards, certificates and workers, on this machine
    torchrun --nproc-per-node 2 quickstart.py                                  # shards run elsewhere: see README.md

Started again with the same ``--checkpoint``, it goes on from where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path, help="a directory: a file for each rank")
    args = parser.parse_args()

    # Rank, world size and address come from torchrun or `arc-worker local`.
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    file = None if args.checkpoint is None else args.checkpoint / f"rank-{rank}.pt"
    saved = torch.load(file, weights_only=True) if file is not None and file.exists() else None

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 16))
    optimizer = arc_topk.optim.AdamW(net.parameters(), lr=0.003)  # line 1: in the place of torch.optim.AdamW
    if saved is not None:
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    model = DistributedDataParallel(net)
    # Line 2. Bytes and times are in arc_topk.summary().
    exchange = arc_topk.register(model, density=0.1, state=None if saved is None else saved["feedback"])

    generator = torch.Generator().manual_seed(1000 * exchange.step + rank)
    for step in range(exchange.step, args.steps):
        inputs = torch.randn(64, 64, generator=generator)
        loss = (model(inputs) - torch.sin(2 * inputs[:, :16])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    if file is not None:
        # Of each rank: what it has not sent yet is its own.
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "feedback": exchange.state_dict()}, file)
    if rank == 0:
        print(f"{arc_topk.summary().compression:.1f} times fewer bytes than dense training", flush=True)
    arc_topk.shutdown()  # line 3: leaves in order
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
