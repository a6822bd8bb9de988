"""Practices of real training."""

from __future__ import annotations

import pytest
import torch

import arc_topk
import jobs
import practices

BOTH = pytest.mark.parametrize("form", ["ddp", "wrapper"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 2e-6) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=tolerance) for name in a)


@BOTH
@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "gradient checkpoints"])
def test_frozen_tied_and_unused_parameters(shards, workers, form, checkpoints):
    got = workers.run(shards(), 2, practices.awkward, form, checkpoints, jobs.LOSSLESS)
    assert same(got[0], got[1])
    fresh = practices.Tied(checkpoints).state_dict()
    assert torch.equal(got[0]["frozen.weight"], fresh["frozen.weight"])
    assert not torch.equal(got[0]["seldom.weight"], fresh["seldom.weight"]), "also where another worker used it"
    assert torch.equal(got[0]["tied.weight"], got[0]["inner.weight"])
    dense = workers.run(shards(), 2, practices.awkward, form, checkpoints, jobs.DENSE)
    assert close(got[0], dense[0])


@BOTH
def test_channels_last(shards, workers, form):
    last = workers.run(shards(), 2, practices.images, form, True)
    first = workers.run(shards(), 2, practices.images, form, False)
    assert same(last[0], last[1]) and close(last[0], first[0], 1e-5)


@BOTH
def test_bfloat16_parameters(shards, workers, form):
    got = workers.run(shards(), 2, practices.narrow, form)
    assert same(got[0], got[1])
    assert not same(got[0], jobs.model().bfloat16().state_dict())


@BOTH
def test_torch_compile(shards, workers, form):
    got = workers.run(shards(), 2, practices.compiled, form)
    assert same(got[0], got[1])
    plain = workers.run(shards(), 2, jobs.wrapper_unclipped, jobs.LOSSLESS, 4)
    assert close(got[0], plain[0])


def test_groups_have_densities_of_their_own(shards, workers):
    rows = workers.run(shards(), 2, practices.grouped)[0]["rows"]
    assert rows["0.weight"] == 16 and rows["2.weight"] == 6
    assert rows["0.bias"] is None, "vectors go whole"


@BOTH
def test_feedback_state_goes_on_to_the_bit(shards, workers, form):
    straight = workers.run(shards(), 2, practices.resumed, form, 8, None)
    first = workers.run(shards(), 2, practices.resumed, form, 3, None)
    state = {f"rank {rank}": got for rank, got in enumerate(first)}
    second = workers.run(shards(), 2, practices.resumed, form, 5, state)
    for a, b in zip(straight, second, strict=True):
        assert same(a["net"], b["net"]) and same(a["arc"]["arrays"], b["arc"]["arrays"])
        assert a["arc"]["step"] == b["arc"]["step"] == 8


@pytest.mark.parametrize("world", [1, 3])
def test_feedback_state_goes_on_with_another_number_of_workers(shards, workers, world):
    two = workers.run(shards(), 2, practices.resumed, "wrapper", 3, None)
    states = [got["arc"] for got in two]
    merged = [arc_topk.merge_states(states, rank, world) for rank in range(world)]
    for name in states[0]["arrays"]:
        mean = sum(state["arrays"][name] for state in states) / 2
        kept = sum(state["arrays"][name] for state in merged) / world
        assert torch.allclose(mean, kept, atol=1e-6), name
    state = {f"rank {rank}": two[0] | {"arc": merged[rank]} for rank in range(world)}
    got = workers.run(shards(2, world), world, practices.resumed, "wrapper", 3, state)
    assert all(same(got[0]["net"], other["net"]) for other in got)
    assert got[0]["arc"]["step"] == 6


def test_wrong_calls_are_named(shards, workers):
    second, after = workers.run(shards(), 2, practices.wrong_call)[0]
    assert "member of a job already" in second
    assert "not in a job yet" in after
