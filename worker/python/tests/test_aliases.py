"""Memory that more than one uses, hooks that must be called once, rows that are not gradients'."""

from __future__ import annotations

import pytest
import torch

import aliases


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_gradients_that_share_memory_are_kept_apart(shards, workers, scaled):
    expected = workers.run(shards(), 2, aliases.trained, True, scaled)
    got = workers.run(shards(), 2, aliases.trained, False, scaled)
    for one, other in zip(got[0], expected[0], strict=True):
        assert torch.equal(one, other)


def test_tensors_within_one_another_are_refused(shards, workers):
    assert all("same memory" in said for said in workers.run(shards(), 2, aliases.overlapping))


def test_a_call_that_fails_needs_nothing_of_its_tensors(shards, workers):
    for kept in workers.run(shards(), 2, aliases.broken_off):
        assert all(kept)


def test_a_hook_of_the_step_is_called_once(shards, workers):
    assert workers.run(shards(), 2, aliases.hooks) == [1, 1]


def test_local_steps_move_all_rows(shards, workers):
    for moved in workers.run(shards(), 2, aliases.local_rows):
        assert all(moved)
