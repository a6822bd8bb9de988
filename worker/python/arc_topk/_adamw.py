"""A step of catch-up AdamW, computed in one of three ways that keep the same state and agree to rounding.

:func:`in_place` is one native call for all tensors, :func:`by_foreach` torch's calls for many tensors at once, and
:func:`by_rows` the rule itself, a tensor at a time.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch

from . import _native
from ._rows import RowAges
from ._tensors import DTYPES, flat, is_dense


@dataclasses.dataclass(frozen=True)
class Rule:
    """What all tensors of a group have in common."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    #: Learning rates of the last steps, this one's first. Before the first step of a run there are none.
    rates: list[float]
    cap: int
    maximize: bool

    @property
    def keep(self) -> float:
        """What decay leaves of a parameter."""
        return 1.0 - self.rates[0] * self.weight_decay

    def rate(self, steps: int) -> float:
        """Sum of the learning rates of so many steps."""
        return sum(self.rates[:steps])


@dataclasses.dataclass(frozen=True)
class Came:
    """A parameter whose gradient came, and which rows of it."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, Any]
    #: ``None`` for all.
    rows: torch.Tensor | None
    width: int


#: What the native call reads and writes of a state, as which type.
_STATE = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "last": torch.int64, "seen": torch.int64}


def in_place(rule: Rule, tensors: list[Came]) -> None:
    """In one native call, without the interpreter's lock. What it cannot work on goes to :func:`by_foreach`."""
    own: list[Came] = []
    others: list[Came] = []
    for came in tensors:
        (own if _is_native(came) else others).append(came)
    if own:
        # They must live as long as the call.
        held = [(_like(came.gradient, came.parameter), None if came.rows is None else came.rows.contiguous()) for came in own]
        _native.catch_up_adamw(
            [_described(came, gradient, rows) for came, (gradient, rows) in zip(own, held, strict=True)],
            betas=rule.betas,
            eps=rule.eps,
            weight_decay=rule.weight_decay,
            rates=rule.rates,
            cap=rule.cap,
            maximize=rule.maximize,
            parallel=torch.get_num_threads() > 1,
        )
        for came in own:
            came.state["step"] += 1
            _written(came.parameter)
    if others:
        by_foreach(rule, others)


def _written(tensor: torch.Tensor) -> None:
    """A graph that was kept must notice, as it does after torch's own optimizers."""
    increment = getattr(torch.autograd.graph, "increment_version", None)
    if increment is not None:
        increment(tensor)


def _is_native(came: Came) -> bool:
    host = came.parameter.device.type == "cpu" and came.gradient.device.type == "cpu"
    known = came.parameter.dtype in DTYPES and came.gradient.dtype == came.parameter.dtype
    kept = all(_is_plain(came.state[name], dtype) for name, dtype in _STATE.items())
    rows = came.rows is None or (came.rows.dtype == torch.int64 and came.rows.device.type == "cpu")
    return host and known and kept and rows and is_dense(came.parameter)


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_contiguous() and tensor.dtype == dtype and tensor.device.type == "cpu"


def _described(came: Came, gradient: torch.Tensor, rows: torch.Tensor | None) -> tuple[Any, ...]:
    state = came.state
    places = [came.parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["last"], state["seen"], rows]
    return (
        DTYPES[came.parameter.dtype],
        came.width,
        state["step"] + 1,
        *(None if place is None else (place.data_ptr(), place.numel()) for place in places),
    )


def by_foreach(rule: Rule, tensors: list[Came]) -> None:
    """Tensors that came whole together, the others one at a time."""
    together: dict[tuple[Any, ...], list[Came]] = defaultdict(list)
    for came in tensors:
        ages = _common_ages(came, rule.cap)
        if ages is None:
            by_rows(rule, came)
        else:
            together[(*ages, came.parameter.dtype, came.parameter.device)].append(came)
    for (steps, seen, *_), alike in together.items():
        _whole(rule, alike, steps, seen)


def _common_ages(came: Came, cap: int) -> tuple[int, int] | None:
    """τ and T, where all rows came and have the same."""
    last, seen = came.state["last"], came.state["seen"]
    if came.rows is not None or not last.numel() or not is_dense(came.parameter):
        return None
    (first, newest), (least, most) = last.aminmax(), seen.aminmax()
    if int(first) != int(newest) or int(least) != int(most):
        return None
    steps = min(came.state["step"] + 1 - int(newest), cap)
    return steps, int(most) + steps


def _whole(rule: Rule, tensors: list[Came], steps: int, seen: int) -> None:
    """Tensors that all come after so many steps, of which the moments have seen so many."""
    parameters, firsts, seconds, fresh = [], [], [], []
    for came in tensors:
        numel = came.parameter.numel()
        parameters.append(_flat(came.parameter))
        fresh.append(_flat(_like(came.gradient, came.parameter)).float())
        firsts.append(came.state["exp_avg"].view(-1)[:numel])
        seconds.append(came.state["exp_avg_sq"].view(-1)[:numel])
        came.state["step"] += 1
        came.state["last"].fill_(came.state["step"])
        came.state["seen"].fill_(seen)
    scale = (-1.0 if rule.maximize else 1.0) / steps
    mean = fresh if scale == 1.0 else torch._foreach_mul(fresh, scale)
    (beta1, beta2), (kept1, kept2) = rule.betas, (beta**steps for beta in rule.betas)
    torch._foreach_mul_(parameters, rule.keep)
    torch._foreach_lerp_(firsts, mean, 1.0 - kept1)
    torch._foreach_mul_(seconds, kept2)
    torch._foreach_addcmul_(seconds, mean, mean, 1.0 - kept2)
    divisors = torch._foreach_sqrt(seconds)
    torch._foreach_div_(divisors, (1.0 - beta2**seen) ** 0.5)
    torch._foreach_add_(divisors, rule.eps)
    rate = rule.rate(steps) / (1.0 - beta1**seen)
    if tensors[0].parameter.dtype == torch.float32:
        torch._foreach_addcdiv_(parameters, firsts, divisors, -rate)
        return
    changes = torch._foreach_div(firsts, divisors)
    torch._foreach_mul_(changes, rate)
    torch._foreach_sub_(parameters, [change.to(tensors[0].parameter.dtype) for change in changes])


def by_rows(rule: Rule, came: Came) -> None:
    """The rule, for one tensor."""
    parameter, state, width = came.parameter, came.state, came.width
    rows = state["last"].numel()
    ages = RowAges(rows, rule.cap)
    ages.steps, ages.last = state["step"], state["last"]
    steps = ages.next(came.rows)
    state["step"] = ages.steps
    parameter.mul_(rule.keep)
    which: Any = slice(None) if came.rows is None else came.rows
    state["seen"][which] += steps
    gradient = _like(came.gradient, parameter)
    fresh = _as_rows(_flat(gradient), rows, width)[which].float()
    change = _moved(rule, state, which, -fresh if rule.maximize else fresh, steps)
    sums = torch.tensor([0.0, *rule.rates], dtype=torch.float64).cumsum(0)
    rates = sums[steps.clamp(max=len(sums) - 1)].to(change)[:, None]
    own = _flat(parameter)
    values = _as_rows(own, rows, width)
    values[which] -= (rates * change).to(values.dtype)
    if values.data_ptr() != parameter.data_ptr():
        # Their memory is not the parameter's own: the last row was filled up, or elements lie apart.
        whole = values.view(-1)[: parameter.numel()]
        if is_dense(parameter):
            own.copy_(whole)
        else:
            parameter.copy_(whole.view(parameter.shape))


def _moved(rule: Rule, state: dict[str, Any], which: Any, fresh: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Moves the moments of the rows that came, and gives m̂/(√v̂+ε) of them."""
    taus, seen = steps.double(), state["seen"][which].double()
    mean = fresh / taus.to(fresh)[:, None]
    averages = []
    samples = (("exp_avg", rule.betas[0], mean), ("exp_avg_sq", rule.betas[1], mean * mean))
    for name, beta, sample in samples:
        kept = (beta**taus).to(fresh)[:, None]
        moved = kept * state[name][which] + (1.0 - beta**taus).to(fresh)[:, None] * sample
        state[name][which] = moved
        averages.append(moved / (1.0 - beta**seen).to(fresh)[:, None])
    return averages[0] / (averages[1].sqrt() + rule.eps)


def _like(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient, its elements in the order of the parameter's."""
    if gradient.stride() == parameter.stride() or not is_dense(parameter):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements as they lie in memory, where they lie together: rows are counted there. Else a copy."""
    return flat(tensor) if is_dense(tensor) else tensor.reshape(-1)


def _as_rows(flat: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """The elements as rows; the last one filled up with zeros, where it is short."""
    if flat.numel() != rows * width:
        flat = torch.nn.functional.pad(flat, (0, rows * width - flat.numel()))
    return flat.view(rows, width)
