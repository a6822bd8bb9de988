"""Catch-up AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import arc_topk
import jobs
from arc_topk import optim


def trained(make, steps: int = 20) -> list[torch.Tensor]:
    net = jobs.model()
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10)
    for step in range(steps):
        optimizer.zero_grad()
        jobs.loss_of(net, 0, step).backward()
        optimizer.step()
        scheduler.step()
    return jobs.values(net)


def test_where_all_rows_come_it_is_adamw():
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    ours = trained(lambda p: optim.AdamW(p, **settings))
    torchs = trained(lambda p: torch.optim.AdamW(p, **settings))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(ours, torchs, strict=True))


def by_hand(rows: list[dict[int, torch.Tensor]], rates: list[float], cap: int) -> torch.Tensor:
    """The rule, a row and a step at a time."""
    beta1, beta2, eps, decay = 0.9, 0.99, 1e-8, 0.1
    values = torch.zeros(3, 2, dtype=torch.float64) + 1.0
    m, v = torch.zeros_like(values), torch.zeros_like(values)
    last, total = [0, 0, 0], [0, 0, 0]
    for step, came in enumerate(rows, start=1):
        values *= 1.0 - rates[step - 1] * decay
        for row, gradient in came.items():
            tau = min(step - last[row], cap)
            last[row] = step
            total[row] += tau
            mean = gradient.double() / tau
            m[row] = beta1**tau * m[row] + (1 - beta1**tau) * mean
            v[row] = beta2**tau * v[row] + (1 - beta2**tau) * mean**2
            rate = sum(rates[step - tau : step])
            corrected = m[row] / (1 - beta1 ** total[row]), v[row] / (1 - beta2 ** total[row])
            values[row] -= rate * corrected[0] / (corrected[1].sqrt() + eps)
    return values


@pytest.mark.parametrize("cap", [20, 3])
def test_rows_catch_up(monkeypatch, cap):
    generator = torch.Generator().manual_seed(5)
    gradient = lambda: torch.randn(2, generator=generator)  # noqa: E731
    came = [{0: gradient(), 1: gradient(), 2: gradient()}, {1: gradient()}, {1: gradient()}, {}, {0: gradient()}]
    came += [{1: gradient()}, {0: gradient(), 2: gradient()}]
    rates = [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04]
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = optim.AdamW([parameter], betas=(0.9, 0.99), weight_decay=0.1, catch_up_cap=cap)
    for rows, rate in zip(came, rates, strict=True):
        parameter.grad = torch.zeros(3, 2)
        for row, values in rows.items():
            parameter.grad[row] = values
        monkeypatch.setattr(optim, "fresh_rows", lambda _, rows=rows: torch.tensor(sorted(rows), dtype=torch.int64))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert torch.allclose(parameter.detach().double(), by_hand(came, rates, cap), rtol=1e-5, atol=1e-6)


def test_its_state_can_be_saved_and_goes_on_to_the_bit():
    net = jobs.model()
    optimizer = optim.AdamW(net.parameters(), lr=0.01)

    def step(net, optimizer, number):
        optimizer.zero_grad()
        jobs.loss_of(net, 0, number).backward()
        optimizer.step()

    for number in range(5):
        step(net, optimizer, number)
    again = copy.deepcopy(net)
    resumed = optim.AdamW(again.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(5, 9):
        step(net, optimizer, number)
        step(again, resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(jobs.values(net), jobs.values(again), strict=True))


def test_rows_are_known_in_a_job(shards, workers):
    got = workers.run(shards(), 2, jobs.caught_up, 12)
    for name in got[0]["values"]:
        assert torch.equal(got[0]["values"][name], got[1]["values"][name])
    fresh = got[0]["fresh"]
    assert all(rows is None for rows in fresh[:2]), "the warm-up is dense"
    assert all(len(rows) == 8 for rows in fresh[2:]), "a quarter of 32 rows"
    assert got[0]["loss"][-1] < got[0]["loss"][0]


def test_what_is_out_of_range_is_named():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(arc_topk.ConfigError, match="betas is"):
        optim.AdamW([parameter], betas=(0.9, 1.0))
    with pytest.raises(arc_topk.ConfigError, match="catch_up_cap is 0"):
        optim.AdamW([parameter], catch_up_cap=0)
