"""Whole jobs: real shards, and workers with real gradients."""

from __future__ import annotations

import pytest
import torch

import jobs


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 2e-6) -> bool:
    return all(torch.allclose(x, y, rtol=1e-5, atol=tolerance) for x, y in zip(a, b, strict=True))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_all_reduce_brings_means(shards, workers):
    got = workers.run(shards(), 2, jobs.reduced, 3)
    for step in range(3):
        for worker in got:
            assert torch.equal(worker[step][0], torch.full((40, 3), 0.5 + step))
            assert torch.equal(worker[step][1], torch.arange(5.0) * 0.5)


@pytest.mark.parametrize("settings", [jobs.DENSE, jobs.LOSSLESS], ids=["dense", "density 1"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_hook_does_what_gloo_does(shards, workers, settings, world):
    ours = workers.run(shards(2, world), world, jobs.ddp, settings, 12)
    gloo = workers.run(shards(1, world), world, jobs.ddp, None, 12)
    assert all(same(ours[0], other) for other in ours[1:])
    assert close(ours[0], gloo[0])


def test_many_buckets_that_are_rebuilt_change_nothing(shards, workers):
    one = workers.run(shards(), 2, jobs.ddp, jobs.SPARSE, 12)
    many = workers.run(shards(), 2, jobs.ddp, jobs.SPARSE, 12, 0.001)
    assert same(one[0], one[1]) and same(many[0], many[1])
    assert same(one[0], many[0]), "to the bit"


def test_the_wrapper_does_what_the_hook_does(shards, workers):
    hook = workers.run(shards(), 2, jobs.ddp, jobs.SPARSE, 12)
    wrapper = workers.run(shards(), 2, jobs.wrapper, jobs.SPARSE, 12)
    assert same(hook[0], wrapper[0]) and same(wrapper[0], wrapper[1])


def test_workers_start_with_the_parameters_of_the_first(shards, workers):
    ours = workers.run(shards(), 2, jobs.wrapper, jobs.LOSSLESS, 3, True)
    alike = workers.run(shards(), 2, jobs.wrapper, jobs.LOSSLESS, 3)
    assert same(ours[0], ours[1]) and same(ours[0], alike[0])


@pytest.mark.parametrize("form", ["ddp", "wrapper"])
def test_gradients_add_up_under_no_sync(shards, workers, form):
    split = workers.run(shards(), 2, jobs.accumulated, form, 3)
    assert same(split[0], split[1])
    # Alone, over all batches at once.
    net = jobs.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            for at in range(3):
                (jobs.loss_of(net, rank, 3 * step + at) / 6).backward()
        optimizer.step()
    assert close(split[0], jobs.values(net))


@pytest.mark.parametrize("form", ["ddp", "wrapper"])
def test_an_overflow_on_one_worker_skips_the_step_on_all(shards, workers, form):
    got = workers.run(shards(), 2, jobs.overflow, form)
    assert same(got[0]["values"], got[1]["values"])
    for worker in got:
        moved, residual, scales = zip(*worker["seen"], strict=True)
        assert moved == (True, True, True, False, True, True)
        assert residual == moved, "feedback changes with every step that counts, and with no other"
        assert worker["skipped"] == 1
        assert scales[3] < scales[2] < scales[5] * 4
