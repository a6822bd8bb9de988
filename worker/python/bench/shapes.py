"""Models with the shapes of real ones, whose backward costs little, so that averaging is most of a step."""

from __future__ import annotations

import torch
from torch import nn

#: Hidden and intermediate size, layers and vocabulary of LLaMAs, as GaLore and ARC-Top-K's paper have them.
SHAPES = {
    "60m": (512, 1376, 8, 32000),
    "130m": (768, 2048, 12, 32000),
    "350m": (1024, 2736, 24, 32000),
    "1b": (2048, 5461, 24, 32000),
}


def shape_of(name: str) -> tuple[int, int, int, int]:
    """By a name of :data:`SHAPES`, or one with fewer layers: ``1b-12`` is the 1B's with 12 of its 24.

    Raises ValueError, which says what there is.
    """
    known, _, layers = name.partition("-")
    if known not in SHAPES or (layers and not layers.isdecimal()):
        raise ValueError(f"{name!r} is no shape: {', '.join(SHAPES)}, or one of them with fewer layers, as 1b-12")
    hidden, intermediate, most, vocabulary = SHAPES[known]
    if layers and not 1 <= int(layers) <= most:
        raise ValueError(f"{name!r}: {known} has 1 to {most} layers")
    return hidden, intermediate, int(layers or most), vocabulary


class SideBySide(nn.Module):
    """Linear layers of the shapes of a LLaMA, and its norms; backward costs little more than writing the gradients."""

    def __init__(self, hidden: int, intermediate: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        block = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
        shapes = [(vocabulary, hidden), *block * layers, (vocabulary, hidden)]
        self.parts = nn.ModuleList([nn.Linear(inputs, outputs, bias=False) for outputs, inputs in shapes])
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(hidden)) for _ in range(2 * layers + 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Loss of a batch of vectors, which have as many elements as the widest layer takes."""
        loss = x.new_zeros(())
        for part in self.parts:
            loss = loss + part(x[:, : part.in_features]).square().mean()
        for norm in self.norms:
            loss = loss + (x[:, : len(norm)] * norm).square().mean()
        return loss

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient in float32."""
        return sum(4 * parameter.numel() for parameter in self.parameters())
