"""What becomes of a worker's steps, its place and its news."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import arc_topk
import jobs
import lifecycle
from arc_topk._replica import Rejoins, Replica


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
        assert worker["counts"] == ([] if kind == "sgd" else [5.0]), "the optimizer's own count leaves it out"


def test_a_worker_that_is_asked_to_end_leaves_and_the_others_go_on(shards, workers):
    job = shards(2, 2, "--admin=127.0.0.1:0")
    got = workers.run(job, 2, lifecycle.asked_to_end, job.pages[0])
    assert (got[1]["status"], len(got[1]["sizes"])) == (143, 5)
    assert (got[0]["status"], len(got[0]["sizes"]), got[0]["sizes"][-1]) == (0, 12, 1)
    assert got[0]["lost"] == 0, "it said goodbye"


@pytest.mark.parametrize("asked", [True, False])
def test_sigterm_stays_the_scripts_own(shards, workers, asked):
    assert workers.run(shards(), 2, lifecycle.leaves_sigterm_alone, asked) == [True, True]


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


def test_a_worker_whose_parameters_differ_joins_again(shards, workers):
    got = workers.run(shards(2, 3, "--max-workers=4", "--resync"), 3, lifecycle.comes_apart, True)
    assert [worker["rank"] for worker in got] == [0, 3, 2]
    for other in got[1:]:
        assert same(got[0]["values"], other["values"])
        for name, value in got[0]["state"].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][name])), name
    said = got[1]["said"]
    assert "parameters of rank 1 differ" in said[0] and "joining again" in said[0]
    assert "joined again" in said[1] and "as rank 3" in said[1] and len(said) == 2
    residuals = got[1]["residuals"]
    assert residuals and all(not value.any() for value in residuals.values()), "it starts with nothing held back"
    assert got[1]["passed"] == sorted(got[1]["passed"]) and got[0]["passed"] == list(range(60))
    assert got[0]["said"] == got[2]["said"] == []


def test_without_elastic_a_place_that_is_lost_is_an_error(shards, workers):
    got = workers.run(shards(2, 3, "--max-workers=4", "--resync"), 3, lifecycle.comes_apart, False)
    assert "parameters of rank 1 differ" in got[1]["error"]
    assert same(got[0]["values"], got[2]["values"]) and not same(got[0]["values"], got[1]["values"])


def test_a_worker_that_stood_still_for_too_long_joins_again(shards, workers, tmp_path):
    got = workers.run(shards(2, 3, "--max-workers=4"), 3, lifecycle.stands_still, str(tmp_path))
    assert [worker["rank"] for worker in got] == [0, 1, 3]
    assert same(got[0]["values"], got[1]["values"]) and same(got[0]["values"], got[2]["values"])
    assert "joining again" in got[2]["said"][0] and "joined again" in got[2]["said"][-1]


class Elsewhere:
    """An exchange that must be joined again some times before it holds."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.step, self.rank = 7, 1
        self.session = self

    def join_again(self) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise arc_topk.Superseded("again")

    def needs_snapshot(self) -> bool:
        return False


def test_joining_again_pauses_ever_longer_and_ends(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)

    def replica(refusals: int, elastic: bool = True) -> Replica:
        exchange: Any = Elsewhere(refusals)
        return Replica(exchange, [], {}, elastic=elastic)

    lost = arc_topk.Superseded("lost")
    replica(2).join_again(lost)
    assert pauses == [1.0, 2.0, 4.0]
    pauses.clear()
    with pytest.raises(arc_topk.Superseded, match="again"):
        replica(99).join_again(lost)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    with pytest.raises(arc_topk.Superseded, match="lost"):
        replica(0, elastic=False).join_again(lost)
    rejoins = Rejoins()
    assert [rejoins.next_pause(step) for step in (0, 49, 99, 100)] == [1.0, 2.0, 1.0, 2.0]


def test_a_worker_joins_local_steps_that_run(shards, workers, tmp_path):
    got = workers.run(shards(2, 2, "--max-workers=3"), 3, lifecycle.local_rounds, 40, str(tmp_path / "under-way"), False)
    # It is a member before it has caught up, and nobody waits for it meanwhile.
    assert got[0]["first"] == got[1]["first"] == 0 and 5 <= got[2]["first"] < 40
    assert got[0]["counts"] == [] and got[2]["counts"][0] >= 20, "with the inner optimizer's state of another"
    for other in got[1:]:
        assert same(got[0]["values"], other["values"])
        for name, value in got[0]["outer"].items():
            assert torch.equal(value, other["outer"][name]), name
    assert [worker["said"] for worker in got] == [[], [], []]


def test_a_worker_joins_local_steps_again(shards, workers, tmp_path):
    job = shards(2, 2, "--max-workers=4", "--resync")
    got = workers.run(job, 3, lifecycle.local_rounds, 50, str(tmp_path / "under-way"), True)
    assert [worker["rank"] for worker in got] == [0, 3, 2]
    assert same(got[0]["values"], got[1]["values"]) and same(got[0]["values"], got[2]["values"])
    assert "parameters of rank 1 differ" in got[1]["said"][0] and "joined again" in got[1]["said"][-1]


@pytest.mark.parametrize("form", ["ddp", "wrapper"])
def test_shards_know_losses_and_times(shards, workers, form):
    job = shards(2, 2, "--admin=127.0.0.1:0")
    got = workers.run(job, 2, lifecycle.tells, job.pages[0], form)
    first, second = got[0]["reports"]
    assert first["loss"] == pytest.approx(got[0]["losses"][4]) and second["loss"] is None, "as none was said"
    for report in (first, second):
        assert report["step_seconds"] > report["wait_seconds"] > 0.0
        assert report["bytes_sent"] > 0 < report["bytes_dense_equivalent"]
    curve = [(point["step"], point["loss"]) for point in json.loads(lifecycle.read(job.pages[0] + "status"))["loss"]]
    assert curve == [(step, pytest.approx(loss)) for step, loss in enumerate(got[0]["losses"])]
    loss = next(line for line in got[0]["metrics"].splitlines() if line.startswith("arc_training_loss"))
    assert float(loss.split()[-1]) == pytest.approx(got[0]["losses"][4])


def test_a_worker_that_waits_for_a_place_says_that_the_job_is_full(shards, workers, tmp_path):
    got = workers.run(shards(2, 2), 3, lifecycle.waits_for_a_place, str(tmp_path))
    assert [worker["first"] for worker in got] == [0, 0, 10]
    assert same(got[0]["values"], got[2]["values"])
