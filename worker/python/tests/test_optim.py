"""Catch-up AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import arc_topk
import jobs
from arc_topk import optim

# The three ways to compute the same.
FORMS = [{"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}]
each_form = pytest.mark.parametrize("form", FORMS, ids=["rows", "foreach", "fused"])


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


@each_form
@pytest.mark.parametrize("cap", [20, 3])
def test_rows_catch_up(monkeypatch, cap, form):
    generator = torch.Generator().manual_seed(5)
    gradient = lambda: torch.randn(2, generator=generator)  # noqa: E731
    came = [{0: gradient(), 1: gradient(), 2: gradient()}, {1: gradient()}, {1: gradient()}, {}, {0: gradient()}]
    came += [{1: gradient()}, {0: gradient(), 2: gradient()}]
    rates = [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04]
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = optim.AdamW([parameter], betas=(0.9, 0.99), weight_decay=0.1, catch_up_cap=cap, **form)
    for rows, rate in zip(came, rates, strict=True):
        parameter.grad = torch.zeros(3, 2)
        for row, values in rows.items():
            parameter.grad[row] = values
        monkeypatch.setattr(optim, "fresh_rows", lambda _, rows=rows: torch.tensor(sorted(rows), dtype=torch.int64))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert torch.allclose(parameter.detach().double(), by_hand(came, rates, cap), rtol=1e-5, atol=1e-6)


@each_form
def test_its_state_can_be_saved_and_goes_on_to_the_bit(form):
    net = jobs.model()
    optimizer = optim.AdamW(net.parameters(), lr=0.01, **form)

    def step(net, optimizer, number):
        optimizer.zero_grad()
        jobs.loss_of(net, 0, number).backward()
        optimizer.step()

    for number in range(5):
        step(net, optimizer, number)
    again = copy.deepcopy(net)
    resumed = optim.AdamW(again.parameters(), lr=0.01, **form)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(5, 9):
        step(net, optimizer, number)
        step(again, resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(jobs.values(net), jobs.values(again), strict=True))


def sparse_run(monkeypatch, form, after=None, dtype=torch.float32, steps: int = 12) -> tuple[list[torch.Tensor], optim.AdamW]:
    """Gradients of which some rows come, in two groups; ``after``: the second half is computed in that form."""
    generator = torch.Generator().manual_seed(3)
    # A matrix, a vector, an image filter whose channels lie last, and one whose elements lie apart.
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 7), (3,), (4, 3, 2, 2), (6, 4))
    ]
    parameters[2].data = parameters[2].data.to(memory_format=torch.channels_last)
    parameters[3].data = parameters[3].data.repeat(1, 2)[:, ::2]
    came: dict[int, torch.Tensor | None] = {}
    monkeypatch.setattr(optim, "fresh_rows", lambda parameter: came[id(parameter)])

    def make(form):
        return optim.AdamW([{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:]}], lr=0.01, weight_decay=0.1, **form)

    optimizer = make(form)
    for step in range(steps):
        if step == steps // 2 and after is not None:
            saved = optimizer.state_dict()
            optimizer = make(after)
            optimizer.load_state_dict(copy.deepcopy(saved))
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            rows = None
            if step % 3 and parameter.dim() > 1:
                chosen = torch.rand(parameter.shape[0], generator=generator) < 0.5
                gradient[~chosen] = 0.0
                rows = chosen.nonzero().flatten()
            came[id(parameter)] = rows
            parameter.grad = gradient.to(dtype)
        optimizer.step()
    return [parameter.detach().float() for parameter in parameters], optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", [*FORMS[1:], {}], ids=["foreach", "fused", "default"])
def test_all_forms_agree_to_rounding(monkeypatch, form, dtype):
    expected, _ = sparse_run(monkeypatch, FORMS[0], dtype=dtype)
    got, _ = sparse_run(monkeypatch, form, dtype=dtype)
    # Of bf16 and f16 a few units in the last place: decay and step are rounded together, or one after the other.
    tolerance = max(1e-5, 4 * torch.finfo(dtype).eps)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("after", FORMS, ids=["to rows", "to foreach", "to fused"])
@each_form
def test_a_checkpoint_goes_on_in_another_form(monkeypatch, form, after):
    expected, reference = sparse_run(monkeypatch, FORMS[0])
    got, optimizer = sparse_run(monkeypatch, form, after)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # It does not bring its own form along, and all keep the same.
    assert all(group[name] == after.get(name) for group in optimizer.param_groups for name in ("foreach", "fused"))
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert [set(group) for group in ours["param_groups"]] == [set(group) for group in theirs["param_groups"]]
    for number, kept in theirs["state"].items():
        assert set(ours["state"][number]) == set(kept)
        for name, value in kept.items():
            torch.testing.assert_close(ours["state"][number][name], value, rtol=1e-5, atol=1e-6)


def test_a_copy_of_an_optimizer_keeps_its_form():
    optimizer = optim.AdamW([torch.nn.Parameter(torch.zeros(2))], foreach=True)
    assert copy.deepcopy(optimizer).param_groups[0]["foreach"] is True
    old = optimizer.__getstate__()
    for group in old["param_groups"]:
        del group["foreach"], group["fused"]
    fresh = optim.AdamW.__new__(optim.AdamW)
    fresh.__setstate__(old)
    assert fresh.param_groups[0]["fused"] is None


def test_state_of_another_model_is_refused_before_anything_is_written():
    parameter = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = optim.AdamW([parameter])
    parameter.grad = torch.ones(4, 2)
    optimizer.step()
    before = parameter.detach().clone()
    for name, wrong in (("exp_avg", torch.zeros(3, 2)), ("seen", torch.zeros(5, dtype=torch.int64))):
        kept = optimizer.state[parameter][name]
        optimizer.state[parameter][name] = wrong
        with pytest.raises(arc_topk.ConfigError, match="was saved for another model"):
            optimizer.step()
        optimizer.state[parameter][name] = kept
    assert torch.equal(parameter.detach(), before)


def test_tensors_that_share_memory_are_refused():
    memory = torch.ones(6)
    parameters = [torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[2:])]
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    with pytest.raises(arc_topk.ConfigError, match="share memory"):
        optim.AdamW(parameters).step()
    assert torch.equal(memory, torch.ones(6))


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


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_settings_of_torchs_that_it_lacks_are_refused(name):
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    settings: dict[str, Any] = {name: False}
    optim.AdamW([parameter], **settings)
    settings[name] = True
    with pytest.raises(arc_topk.ConfigError, match=f"{name} is not supported"):
        optim.AdamW([parameter], **settings)


def test_two_forms_at_once_are_refused():
    with pytest.raises(arc_topk.ConfigError, match="foreach and fused"):
        optim.AdamW([torch.nn.Parameter(torch.zeros(2))], foreach=True, fused=True)
