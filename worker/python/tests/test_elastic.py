"""Workers that join while others train."""

from __future__ import annotations

import torch

import jobs


def test_a_worker_joins_a_running_job(shards, workers, tmp_path):
    job = shards(2, 2, "--max-workers=3")
    got = workers.run(job, 3, jobs.elastic, 120, str(tmp_path / "under-way"))
    assert got[0]["first"] == got[1]["first"] == 0 and 5 < got[2]["first"] <= 21
    for other in got[1:]:
        for name, value in got[0]["values"].items():
            assert torch.equal(value, other["values"][name]), name
        for name, value in got[0]["moments"].items():
            same = torch.equal(value, other["moments"][name]) if torch.is_tensor(value) else value == other["moments"][name]
            assert same, name
    assert {2, 3} <= set(got[0]["worlds"]), "at the end others may have left"
