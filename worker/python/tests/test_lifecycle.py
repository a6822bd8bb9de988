"""What becomes of a worker's steps, its place and its news."""

from __future__ import annotations

import pytest
import torch

import arc_topk
import jobs
import lifecycle


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw", "ours"])
def test_a_closure_changes_nothing(shards, workers, kind):
    plain = workers.run(shards(), 2, lifecycle.by_closure, kind, False)
    closures = workers.run(shards(), 2, lifecycle.by_closure, kind, True)
    assert same(closures[0]["values"], closures[1]["values"])
    for one, other in zip(plain, closures, strict=True):
        assert same(one["values"], other["values"]), "to the bit"
        assert one["losses"] == other["losses"]
    assert closures[0]["losses"] != closures[1]["losses"], "the loss is the worker's own"


@pytest.mark.parametrize("kind", ["sgd", "adamw", "ours"])
def test_all_skip_a_step_by_closure(shards, workers, kind):
    got = workers.run(shards(), 2, lifecycle.by_closure, kind, True, 2)
    assert same(got[0]["values"], got[1]["values"])
    for worker in got:
        assert worker["moved"] == [True, True, False, True, True, True]
        assert worker["skipped"] == 1
        assert all(torch.isfinite(value).all() for value in worker["values"])
        assert worker["counts"] in ([], [5.0]), "the optimizer's own count leaves it out"


def test_an_optimizer_with_many_evaluations_a_step_is_refused(shards, workers):
    assert all("more than once a step" in said for said in workers.run(shards(), 2, lifecycle.twice))
    net = jobs.model()
    with pytest.raises(arc_topk.ConfigError, match="LBFGS"):
        arc_topk.DistributedOptimizer(torch.optim.LBFGS(net.parameters()), net.named_parameters())


def test_a_scheduler_may_be_older_than_the_wrapper(shards, workers):
    early = workers.run(shards(), 2, lifecycle.scheduled, True)
    late = workers.run(shards(), 2, lifecycle.scheduled, False)
    for one, other in zip(early, late, strict=True):
        assert same(one["values"], other["values"]) and one["rate"] == other["rate"] == 0.1 / 16
        assert all(torch.isfinite(value).all() for value in one["values"])
