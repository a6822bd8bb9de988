"""AdamW that knows how long a row has been away.

Under error feedback a row that comes after τ steps brings τ gradients at once. AdamW would square that sum; catch-up AdamW
does, for the row, what τ steps with the mean gradient would have done to the moments, and takes a step that is τ steps long.
Where every row comes in every step it is AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import _adamw
from ._native import ConfigError
from ._rows import RowAges, fresh_rows, row_width

__all__ = ["AdamW", "RowAges", "fresh_rows", "row_width"]

# How a group is computed is this optimizer's own: a checkpoint does not say it.
_FORMS = ("foreach", "fused")


class AdamW(torch.optim.Optimizer):
    """A drop-in for ``torch.optim.AdamW`` where gradients come by rows.

    ``catch_up_cap`` bounds τ: 8 bears higher learning rates at low densities, 20 learns faster at moderate ones.

    ``fused``, the default, updates what lies in main memory by one native call for all tensors of a group, and the rest as
    ``foreach`` does: tensors that came whole together, the others by their rows. With neither, every tensor is updated on its own.
    State is the same for all of them, so that a checkpoint of one goes on with another.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        catch_up_cap: int = 20,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        checks = {
            "lr": (lr, float(lr) >= 0.0),
            "betas": (betas, all(0.0 <= float(beta) < 1.0 for beta in betas)),
            "eps": (eps, eps > 0.0),
            "weight_decay": (weight_decay, weight_decay >= 0.0),
            "catch_up_cap": (catch_up_cap, 1 <= catch_up_cap <= 1000),
        }
        for name, (value, fits) in checks.items():
            if not fits:
                raise ConfigError(f"{name} is {value!r}: it is out of range")
        _refuse(
            amsgrad=(amsgrad, "its largest second moment has no meaning for rows that come seldom"),
            capturable=(capturable, "which rows came is known on the host: a CUDA graph cannot hold the step"),
            differentiable=(differentiable, "the step is computed in place"),
        )
        if foreach and fused:
            raise ConfigError("foreach and fused are both True: choose one of them")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "catch_up_cap": catch_up_cap,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            # Learning rates of the last steps, the newest first.
            "recent": None,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for form in _FORMS:
                group.setdefault(form, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        forms = [{form: group[form] for form in _FORMS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, form in zip(self.param_groups, forms, strict=True):
            group.update(form)
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
        """One step with the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = _begun(group)
            came = [self._came(parameter) for parameter in group["params"] if parameter.grad is not None]
            foreach, fused = group["foreach"], group["fused"]
            if foreach:
                _adamw.by_foreach(rule, came)
            elif fused or (fused is None and foreach is None):
                _adamw.in_place(rule, came)
            else:
                for one in came:
                    _adamw.by_rows(rule, one)
        return loss

    def _came(self, parameter: torch.Tensor) -> _adamw.Came:
        gradient, width = parameter.grad, row_width(parameter)
        assert gradient is not None
        if gradient.is_sparse:
            raise ConfigError("the gradient is a sparse tensor: make the embedding without sparse=True")
        state = self.state[parameter]
        if not state:
            rows = math.ceil(parameter.numel() / width) if parameter.numel() else 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(rows, width, dtype=torch.float32, device=parameter.device)
            for name in ("seen", "last"):
                state[name] = torch.zeros(rows, dtype=torch.int64)
            state["step"] = 0
        return _adamw.Came(parameter, gradient, state, fresh_rows(parameter), width)


def _refuse(**asked: tuple[bool, str]) -> None:
    """Settings of ``torch.optim.AdamW`` that this one does not have."""
    for name, (value, why) in asked.items():
        if value:
            raise ConfigError(f"{name} is not supported by catch-up AdamW: {why}")


def _begun(group: dict[str, Any]) -> _adamw.Rule:
    """The rule of the step that begins, at the group's settings of now."""
    rates = [float(group["lr"]), *(group["recent"] or ())][: group["catch_up_cap"]]
    group["recent"] = rates
    beta1, beta2 = group["betas"]
    return _adamw.Rule(
        betas=(float(beta1), float(beta2)),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        rates=rates,
        cap=group["catch_up_cap"],
        maximize=group["maximize"],
    )
