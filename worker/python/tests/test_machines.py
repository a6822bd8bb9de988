"""Several processes on a machine that are one worker of the job."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import arc_topk
import jobs
import machines
import practices
from arc_topk import _state
from arc_topk._exchange import check_state
from arc_topk._local_group import partition
from arc_topk._machine import _compare
from arc_topk.config import Peers


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 2e-6) -> bool:
    return all(torch.allclose(x, y, rtol=1e-5, atol=tolerance) for x, y in zip(a, b, strict=True))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_two_machines_do_what_gloo_does(shards, workers):
    ours = workers.run(shards(), 4, machines.averaged, jobs.LOSSLESS, 8, 0.001)
    gloo = workers.run(shards(1), 4, jobs.ddp, None, 8)
    assert all(same(ours[0], other) for other in ours[1:])
    assert close(ours[0], gloo[0])


def test_two_machines_are_two_workers(shards, workers):
    straight = workers.run(shards(), 4, machines.caught_up, 8, None)
    means = workers.run(shards(), 2, machines.of_means, 8)
    for process in straight:
        assert same(process["values"], means[0]["values"]), "to the bit"
        assert process["steps"] == 8
        for ours, theirs in zip(process["rows"], means[0]["rows"], strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
    assert any(rows is not None and len(rows) < 24 for rows in means[0]["rows"]), "some rows were held back"
    assert [process["sent"] for process in straight] == [means[0]["sent"], 0, means[1]["sent"], 0]
    assert [process["place"] for process in straight] == [(0, 2), (0, 2), (1, 2), (1, 2)]

    first = workers.run(shards(), 4, machines.caught_up, 3, None)
    states = [process["saved"]["arc"] for process in first]
    assert [state["step"] for state in states] == [3] * 4
    assert [bool(state["arrays"]) for state in states] == [True, False, True, False]
    second = workers.run(shards(), 4, machines.caught_up, 5, [process["saved"] for process in first])
    assert all(same(process["values"], straight[0]["values"]) for process in second), "on to the bit"

    # The leaders' feedback is all that there is.
    for world in (1, 2, 3):
        merged, wanted = (arc_topk.merge_states(given, 0, world) for given in (states, states[::2]))
        assert all(torch.equal(merged["arrays"][name], wanted["arrays"][name]) for name in wanted["arrays"])
    with pytest.raises(arc_topk.ConfigError, match="merge_states"):
        check_state(states[1])


def test_an_overflow_on_a_process_that_follows_skips_the_step_on_all(shards, workers):
    got = workers.run(shards(), 4, jobs.overflow, "machines")
    for rank, process in enumerate(got):
        assert same(process["values"], got[0]["values"])
        moved, residual, scales = zip(*process["seen"], strict=True)
        assert moved == (True, True, True, False, True, True)
        assert residual == (moved if rank % 2 == 0 else (False,) * 6), "feedback is the leaders'"
        assert process["skipped"] == 1 and scales[3] < scales[2]


def test_unused_parameters_and_passes_that_add_up(shards, workers):
    one = workers.run(shards(2, 1), 2, practices.awkward, "machines", False, jobs.LOSSLESS)
    dense = workers.run(shards(), 2, practices.awkward, "ddp", False, jobs.DENSE)
    assert close(list(one[0].values()), list(dense[0].values())) and same(list(one[0].values()), list(one[1].values()))
    split = workers.run(shards(2, 1), 2, jobs.accumulated, "machines", 3)
    flat = workers.run(shards(), 2, jobs.accumulated, "ddp", 3)
    assert same(split[0], split[1]) and close(split[0], flat[0])


def test_all_hear_that_their_leader_fails(shards, workers):
    for rank, said in enumerate(workers.run(shards(1, 1), 2, machines.leader_fails)):
        assert "density" in said[0] and "as a test has it" in said[1]
        assert [("process 0, which speaks with the shards" in words) for words in said] == [rank == 1] * 2


def test_groups_that_differ_in_size_are_refused_on_all(shards, workers):
    for said in workers.run(shards(1, 1), 3, machines.refused):
        assert "1 and 2 processes" in said[0] and "--nproc-per-node" in said[0]
        assert "LOCAL_WORLD_SIZE" in said[1] and "new_subgroups" in said[1]
        assert "leave one of them out" in said[2]


def test_groups_are_a_partition():
    assert partition([(0, 1), (0, 1), (2, 3), (2, 3)]) == [(0, 1), (2, 3)]
    assert partition([(0, 2), (1, 3), (0, 2), (1, 3)]) == [(0, 2), (1, 3)]
    for told in ([(0, 1), (1,)], [(0, 1), (0, 1, 2), (2,)], [(1,), (1,)], [(0, 5)]):
        with pytest.raises(arc_topk.ConfigError, match="its own machine"):
            partition(told)
    with pytest.raises(arc_topk.ConfigError, match="process 1: no"):
        partition([(0,), "no"])


def test_processes_of_a_machine_that_differ_are_refused():
    alike: Any = ([("w", (2, 3), "torch.float32")], (4, 4))
    _compare((2, 3), [alike, alike])
    with pytest.raises(arc_topk.ConfigError, match=r"2 and 3 .*tensors .*\(2, 3\).*\(3, 2\)"):
        _compare((2, 3), [alike, ([("w", (3, 2), "torch.float32")], (4, 4))])
    with pytest.raises(arc_topk.ConfigError, match="different steps"):
        _compare((2, 3), [alike, (alike[0], None)])


def test_which_worker_a_machine_is(monkeypatch):
    torchruns = Peers((), "", "", "", rank=5, world_size=16)

    def place(machine: int, machines: int) -> tuple[int | None, int | None]:
        peers = _state._as_machine(torchruns, machine, machines)
        return peers.rank, peers.world_size

    monkeypatch.setattr(_state, "_asked", (None, None))
    assert place(1, 2) == (1, 2)
    # A process group for each machine.
    monkeypatch.setenv("ARC_RANK", "1")
    monkeypatch.setenv("ARC_WORKERS", "2")
    assert place(0, 1) == (1, 2)
    monkeypatch.setenv("ARC_WORKERS", "16")
    with pytest.raises(arc_topk.ConfigError, match="2 machines"):
        place(0, 2)
    monkeypatch.setattr(_state, "_asked", (0, 3))
    assert place(0, 1) == (0, 3)
