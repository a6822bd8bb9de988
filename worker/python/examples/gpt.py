"""A small GPT on real text, trained by several processes on this machine.

    python gpt.py --workers 4 --method arc --form ddp
    python gpt.py --workers 4 --method dense --form wrapper

Prints the validation loss and the bytes over a worker's link.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import training
from torch import nn


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
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
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


class Text:
    """The next byte of a text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        path = Path(args.text) if args.text else training.dataset("shakespeare.txt")
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        split = int(0.9 * len(data))
        self.seen, self.held_out = data[:split], data[split:]

    def model(self) -> nn.Module:
        return GPT(self.args.context, self.args.width, self.args.layers, self.args.heads)

    def batch(self, generator: torch.Generator) -> training.Batch:
        return self._windows(self.seen, self.args.batch, generator)

    def loss(self, model: nn.Module, batch: training.Batch) -> torch.Tensor:
        tokens, following = batch
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        fixed = torch.Generator().manual_seed(7)
        losses = [self.loss(model, self._windows(self.held_out, 32, fixed)) for _ in range(16)]
        return {"loss": float(torch.stack(losses).mean())}

    def _windows(self, data: torch.Tensor, count: int, generator: torch.Generator) -> training.Batch:
        length = self.args.context
        starts = torch.randint(len(data) - length - 1, (count,), generator=generator)
        windows = torch.stack([data[start : start + length + 1] for start in starts.tolist()]).long()
        return windows[:, :-1], windows[:, 1:]


TASK = Text


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text file (default: Shakespeare, as worker/data/fetch.py fetches it)")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    training.add_arguments(parser, steps=300, lr=0.002, batch=4)
    return parser


if __name__ == "__main__":
    training.run(arguments(), TASK)
