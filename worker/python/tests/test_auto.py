"""``mode="auto"``: what it decides from times alone, and what becomes of gradients when the way changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

import arc_topk
import jobs
import practices
from arc_topk import _auto_hook
from arc_topk._auto import Auto, Way
from test_training import close, same

Times = Callable[[int, Way, bool], float]


class Run:
    """A worker that asks :class:`Auto`, with times that are made up."""

    def __init__(self, times: Times, schedule: int) -> None:
        self.auto = Auto(schedule)
        self.times = times
        self.schedule = schedule
        self.ways: list[Way] = []
        self.spent = 0.0
        self.reasons: list[str] = []
        self._taken: list[float] = []
        self._noise = random.Random(0)

    def steps(self, count: int, noise: float = 0.0) -> Run:
        for _ in range(count):
            step = len(self.ways)
            # Times are known a step late.
            told = self._taken[-2] if step > 1 else None
            choice = self.auto.begin(step, told)
            self.reasons += [choice.reason] if choice else []
            way = self.auto.way
            self.ways.append(way)
            seconds = self.times(step, way, step >= self.schedule)
            self._taken.append(seconds * (1.0 + noise * self._noise.random()))
            self.spent += seconds
        return self

    def goes(self, way: Way) -> bool:
        """Whether the last step went this way."""
        return self.ways[-1] is way


def times(group: float, shards: float, dense: float | None = None) -> Times:
    warm = shards if dense is None else dense
    return lambda _step, way, sparse: group if way is Way.GROUP else shards if sparse else warm


@pytest.mark.parametrize("schedule", [0, 1, 9, 10, 20, 35])
@pytest.mark.parametrize(("group", "shards"), [(15.0, 1.2), (1.0, 1.2), (1.2, 1.1), (0.5, 0.51), (0.4, 4.0)])
def test_the_faster_way_is_taken_whatever_the_warm_up(group, shards, schedule):
    run = Run(times(group, shards, 2 * shards), schedule).steps(schedule + 60, noise=0.002)
    assert run.goes(Way.GROUP if group < shards else Way.SHARDS)
    assert run.auto.settled and len(run.reasons) == 1
    assert run.reasons[0].startswith(run.ways[-1].value)


def test_what_it_tries_costs_little():
    steps = 20_000
    for group, shards in [(15.0, 1.2), (1.0, 1.2), (0.4, 4.0)]:
        run = Run(times(group, shards), 20).steps(steps)
        assert run.spent < 1.02 * steps * min(group, shards)


def test_a_look_is_no_longer_than_it_must_be():
    run = Run(times(1.3, 1.0), 0).steps(1200)
    looked = [step for step, way in enumerate(run.ways) if way is Way.GROUP and step > 100]
    assert len(looked) == 5, "one to settle, four to time"


def test_a_slow_group_is_tried_for_three_steps():
    run = Run(times(30.0, 1.0, 2.0), 20).steps(500)
    assert run.ways.count(Way.GROUP) == 3


def test_the_warm_up_goes_the_faster_way():
    slow = Run(times(1.0, 0.5, 6.0), 40).steps(200)
    # The time of the last of them is known a step late.
    assert slow.ways[:40].count(Way.SHARDS) == 4 and slow.goes(Way.SHARDS)
    fast = Run(times(10.0, 1.0, 3.0), 40).steps(200)
    assert fast.ways[:40].count(Way.GROUP) == 3


def test_a_link_that_gets_slow_or_fast_is_noticed():
    link = {"group": 1.0, "shards": 1.2}
    run = Run(lambda _step, way, _sparse: link["group" if way is Way.GROUP else "shards"], 20).steps(100)
    assert run.goes(Way.GROUP)
    link.update(group=15.0, shards=1.5)
    run.steps(25)
    assert run.goes(Way.SHARDS)
    link.update(group=1.0, shards=1.2)
    run.steps(60)
    assert run.goes(Way.GROUP)
    # One whose own steps show nothing is found by looking now and then.
    link.update(shards=0.8)
    run.steps(2000)
    assert run.goes(Way.SHARDS)


def test_steps_of_all_lengths_are_not_tried_for_ever():
    lengths = random.Random(1)
    run = Run(lambda _step, way, _sparse: (10.0 if way is Way.GROUP else 1.0) * lengths.uniform(0.5, 2.0), 20).steps(4000)
    assert run.goes(Way.SHARDS)
    assert run.ways.count(Way.GROUP) < 60


def test_one_look_settles_what_is_clear_and_doubt_takes_turns():
    clear = Run(times(3.0, 1.0), 0).steps(40)
    assert clear.ways[:6] == [Way.GROUP] * 3 + [Way.SHARDS] * 3 and set(clear.ways[6:]) == {Way.SHARDS}
    doubt = Run(times(1.05, 1.0), 0).steps(40)
    assert doubt.ways[7:27] == ([Way.GROUP] * 5 + [Way.SHARDS] * 5) * 2 and set(doubt.ways[27:]) == {Way.SHARDS}


def test_looks_are_put_off_but_not_for_ever():
    run = Run(times(1.1, 1.0), 0).steps(60_000)
    assert run.ways[-20_000:].count(Way.GROUP) >= 10


@pytest.mark.parametrize("settings", [jobs.LOSSLESS, jobs.DENSE], ids=["density 1", "dense"])
def test_whichever_way_it_goes_it_does_what_gloo_does(shards, workers, settings):
    ours = workers.run(shards(), 2, jobs.ddp_by_itself, settings | {"mode": "auto"}, 40)
    gloo = workers.run(shards(1), 2, jobs.ddp, None, 40)
    assert same(ours[0]["values"], ours[1]["values"]) and close(ours[0]["values"], gloo[0])
    for worker in ours:
        assert worker["through shards"] > 0 and worker["all-reduced"] > 0, "both ways were tried"
        assert worker["choice"].split(":")[0] in ("arc", "all-reduce")


def test_it_bears_what_ddp_bears(shards, workers):
    """Unused parameters, gradients in bfloat16, a GradScaler's overflow, convolutions that lie channels last."""
    got = workers.run(shards(), 2, practices.awkward, "auto", False, jobs.LOSSLESS)
    dense = workers.run(shards(), 2, practices.awkward, "ddp", False, jobs.DENSE)
    assert all(torch.equal(got[0][name], got[1][name]) for name in got[0])
    assert all(torch.allclose(got[0][name], dense[0][name], rtol=1e-4, atol=2e-6) for name in got[0])
    for function, *arguments in [(practices.narrow, "auto"), (practices.images, "auto", True), (jobs.overflow, "auto")]:
        got = workers.run(shards(), 2, function, *arguments)
        values = [worker["values"] if "values" in worker else list(worker.values()) for worker in got]
        assert same(values[0], values[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_narrow_gradient_cannot_hold_stays_held_back(dtype):
    gradient = torch.tensor([1.0, 1.0, -2.0]).to(dtype)
    held = torch.tensor([0.5, 1e-4, 3e-3, 0.0])
    left = _auto_hook._add(gradient, held.numpy().tobytes(), 8.0)
    assert left is not None
    kept = torch.frombuffer(bytearray(left), dtype=torch.float32)
    # In units of the residual: what was added and what is left are what there was.
    assert torch.allclose((gradient.float() - torch.tensor([1.0, 1.0, -2.0])) / 8.0 + kept[:3], held[:3], atol=1e-7)
    assert kept[3] == 0.0 and gradient[0] == 5.0


def test_what_would_overflow_stays_held_back():
    gradient, held = torch.tensor([6e4, 1.0]).half(), torch.tensor([1.0, 1.0]).numpy().tobytes()
    assert _auto_hook._add(gradient, held, 65536.0) == held
    assert torch.equal(gradient, torch.tensor([6e4, 1.0]).half())


def test_workers_that_differ_are_told_so(shards, workers):
    told = workers.run(shards(), 2, jobs.auto_unlike)
    assert any("mode" in each["mode"] and "auto" in each["mode"] for each in told), [each["mode"] for each in told]
    assert all("one checkpoint" in each["start"] for each in told), told


def test_what_was_not_sent_is_averaged_when_the_group_takes_over(shards, workers):
    got = workers.run(shards(), 2, jobs.both_ways, 5)
    for worker in got:
        # The gradients do not depend on the parameters, so that sums tell whether any was lost.
        assert not torch.allclose(worker["before"], worker["dense_before"], atol=1e-3), "something was held back"
        assert torch.allclose(worker["after"], worker["dense_after"], atol=1e-5)
        assert worker["held"] == 0.0 and worker["held_before"] > 0.0
        assert worker["held_after_nan"] == pytest.approx(worker["held_again"]), "a step of no use takes nothing"
        assert worker["rows"] == [False, True], "rows that came, then all"
        assert worker["all_reduced"] == 3
    assert torch.equal(got[0]["after"], got[1]["after"])


def test_auto_needs_a_process_group():
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(arc_topk.ConfigError, match="DistributedDataParallel"):
        arc_topk.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), [("weight", weight)], mode="auto")
    with pytest.raises(arc_topk.ConfigError, match="ef14"):
        _auto_hook.check(arc_topk.Config(mode="auto", feedback="ef21"))
    with pytest.raises(arc_topk.ConfigError, match="arc or auto"):
        arc_topk.Config(mode="fast")
