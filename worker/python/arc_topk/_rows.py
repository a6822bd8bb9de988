"""Which rows of a gradient came, and when they did so last."""

from __future__ import annotations

import torch

from ._state import exchange_of


def fresh_rows(parameter: torch.Tensor) -> torch.Tensor | None:
    """Rows of the parameter's gradient that came in the last step, ascending; ``None`` for all of them.

    A row is a slice of the first dimension (or ``block_width`` elements, where the config says so). Rows that did not come
    hold zeros under ef14. For optimizers that keep something by row; :class:`RowAges` counts the steps.
    """
    found = exchange_of(parameter)
    return None if found is None else found[0].fresh_rows(found[1])


def row_width(parameter: torch.Tensor) -> int:
    """Elements of a row of the parameter."""
    found = exchange_of(parameter)
    if found is not None:
        return found[0].widths[found[1]]
    return parameter.numel() // max(1, parameter.shape[0]) if parameter.dim() > 1 else max(1, parameter.numel())


class RowAges:
    """After how many steps the rows of one parameter come. Ask once in each step of the optimizer."""

    def __init__(self, rows: int, cap: int) -> None:
        self.cap = cap
        self.steps = 0
        self.last = torch.zeros(rows, dtype=torch.int64)

    def next(self, came: torch.Tensor | None) -> torch.Tensor:
        """Steps since each of the rows that came did so last, at most ``cap``; 1 for those that came in the last step, too."""
        self.steps += 1
        last = self.last if came is None else self.last[came]
        ages = (self.steps - last).clamp(max=self.cap)
        if came is None:
            self.last.fill_(self.steps)
        else:
            self.last[came] = self.steps
        return ages
