"""AdamW that knows how long a row has been away.

Under error feedback a row that comes after τ steps brings τ gradients at once. AdamW would square that sum; catch-up AdamW
does, for the row, what τ steps with the mean gradient would have done to the moments, and takes a step that is τ steps long.
Where every row comes in every step it is AdamW.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ._native import ConfigError
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
    return parameter.numel() // parameter.shape[0] if parameter.dim() > 1 else max(1, parameter.numel())


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


class AdamW(torch.optim.Optimizer):
    """A drop-in for ``torch.optim.AdamW`` where gradients come by rows.

    ``catch_up_cap`` bounds τ: 8 bears higher learning rates at low densities, 20 learns faster at moderate ones.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        catch_up_cap: int = 20,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        del foreach, fused  # Rows are what is worked on together; taken so that this is a drop-in.
        checks = {
            "lr": (lr, lr >= 0.0),
            "betas": (betas, all(0.0 <= beta < 1.0 for beta in betas)),
            "eps": (eps, eps > 0.0),
            "weight_decay": (weight_decay, weight_decay >= 0.0),
            "catch_up_cap": (catch_up_cap, 1 <= catch_up_cap <= 1000),
        }
        for name, (value, fits) in checks.items():
            if not fits:
                raise ConfigError(f"{name} is {value!r}: it is out of range")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "catch_up_cap": catch_up_cap,
            "maximize": maximize,
            # Learning rates of the last steps, the newest first.
            "recent": None,
        }
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch gives all state the parameter's type; moments are kept in float32, and counts are whole.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if torch.is_tensor(value):
                    device = parameter.device if name.startswith("exp_avg") else "cpu"
                    self.state[parameter][name] = value.detach().clone().to(device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = float(group["lr"])
            recent = deque(group["recent"] or (), maxlen=group["catch_up_cap"])
            recent.appendleft(lr)
            group["recent"] = list(recent)
            # Sums of the newest 1, 2, ... rates; the first ones of a run stand for those before it.
            sums = torch.tensor([0.0, *recent], dtype=torch.float64).cumsum(0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, sums)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], sums: torch.Tensor) -> None:
        gradient = -parameter.grad if group["maximize"] else parameter.grad
        width = row_width(parameter)
        rows = math.ceil(parameter.numel() / width) if parameter.numel() else 0
        state = self.state[parameter]
        if not state:
            like = {"dtype": torch.float32, "device": parameter.device}
            state["exp_avg"] = torch.zeros(rows, width, **like)
            state["exp_avg_sq"] = torch.zeros(rows, width, **like)
            state["seen"] = torch.zeros(rows, dtype=torch.int64)
            state["last"] = torch.zeros(rows, dtype=torch.int64)
            state["step"] = 0
        came = fresh_rows(parameter)
        ages = RowAges(rows, group["catch_up_cap"])
        ages.steps, ages.last = state["step"], state["last"]
        steps = ages.next(came)
        state["step"] = ages.steps
        parameter.mul_(1.0 - float(group["lr"]) * group["weight_decay"])
        which: Any = slice(None) if came is None else came
        state["seen"][which] += steps
        values = _as_rows(parameter, rows, width)
        fresh = _as_rows(gradient, rows, width)[which].float()
        change = self._moments(state, which, fresh, steps, group)
        rates = sums[steps.clamp(max=len(sums) - 1)].to(change)[:, None]
        values[which] -= (rates * change).to(values.dtype)
        _from_rows(parameter, values)

    @staticmethod
    def _moments(
        state: dict[str, Any], which: Any, fresh: torch.Tensor, steps: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Moves the moments of the rows that came, and gives m̂/(√v̂+ε) of them."""
        taus, seen = steps.double(), state["seen"][which].double()
        mean = fresh / taus.to(fresh)[:, None]
        averages = []
        for name, beta, sample in (
            ("exp_avg", group["betas"][0], mean),
            ("exp_avg_sq", group["betas"][1], mean * mean),
        ):
            kept = (beta**taus).to(fresh)[:, None]
            moved = kept * state[name][which] + (1.0 - beta**taus).to(fresh)[:, None] * sample
            state[name][which] = moved
            averages.append(moved / (1.0 - beta**seen).to(fresh)[:, None])
        return averages[0] / (averages[1].sqrt() + group["eps"])


def _as_rows(tensor: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """The elements as rows; the last one filled up with zeros, where it is short."""
    if tensor.dim() > 1 and tensor.shape[0] == rows:
        return tensor.reshape(rows, width)
    flat = tensor.reshape(-1)
    if flat.numel() != rows * width:
        flat = torch.nn.functional.pad(flat, (0, rows * width - flat.numel()))
    return flat.view(rows, width)


def _from_rows(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Puts rows back where they are not the parameter's own memory."""
    if values.data_ptr() != parameter.data_ptr():
        parameter.copy_(values.reshape(-1)[: parameter.numel()].view(parameter.shape))
