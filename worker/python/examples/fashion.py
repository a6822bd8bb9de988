"""A convolutional network on Fashion-MNIST, trained by several processes on this machine.

    python fashion.py --workers 4 --method arc --form ddp
    python fashion.py --workers 4 --method powersgd --rank 4

Prints the validation loss, the accuracy and the bytes over a worker's link.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import torch
import training
from torch import nn


def idx(path: Path) -> torch.Tensor:
    """The bytes of an IDX file (yann.lecun.com/exdb/mnist), shaped as its header says."""
    content = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(content[4 + 4 * at : 8 + 4 * at]) for at in range(content[3])]
    return torch.frombuffer(bytearray(content[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)


class Fashion:
    """Kinds of clothes on images of 28 by 28 pixels."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        directory = training.dataset("fashion-mnist")
        self.seen, self.held_out = (
            (idx(directory / f"{part}-images-idx3-ubyte.gz"), idx(directory / f"{part}-labels-idx1-ubyte.gz"))
            for part in ("train", "t10k")
        )

    def model(self) -> nn.Module:
        wide = self.args.width
        return nn.Sequential(
            nn.Conv2d(1, wide, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(wide, 2 * wide, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * wide, 2 * wide, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * wide * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def batch(self, generator: torch.Generator) -> training.Batch:
        images, labels = self.seen
        chosen = torch.randint(len(labels), (self.args.batch,), generator=generator)
        return self._batch(images[chosen], labels[chosen])

    def loss(self, model: nn.Module, batch: training.Batch) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(model(images), labels)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        images, labels = self._batch(*self.held_out)
        logits = torch.cat([model(part) for part in images.split(500)])
        right = (logits.argmax(1) == labels).float().mean()
        return {"loss": float(nn.functional.cross_entropy(logits, labels)), "accuracy": float(right)}

    @staticmethod
    def _batch(images: torch.Tensor, labels: torch.Tensor) -> training.Batch:
        return (images.float()[:, None] - 73.0) / 90.0, labels.long()


TASK = Fashion


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolution")
    training.add_arguments(parser, steps=300, lr=0.003, batch=32)
    return parser


if __name__ == "__main__":
    training.run(arguments(), TASK)
