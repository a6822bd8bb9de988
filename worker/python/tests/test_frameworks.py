"""Training frameworks, as their users would use them."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import Any

import pytest
import torch

import arc_topk
import frameworks
import jobs
from arc_topk.integrations import transformers as hf
from arc_topk.integrations._common import Place


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=5e-6) for name in a)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_trainer_does_what_it_does_alone(shards, workers, tmp_path):
    plain = workers.run(shards(), 2, frameworks.hugging_face, str(tmp_path / "plain"), None, 4)
    ours = workers.run(shards(), 2, frameworks.hugging_face, str(tmp_path / "ours"), jobs.LOSSLESS, 4)
    assert same(ours[0]["net"], ours[1]["net"]) and close(ours[0]["net"], plain[0]["net"])
    assert not close(ours[0]["net"], dict(frameworks.tiny_bert().named_parameters())), "it has learnt"
    elements = sum(value.numel() for value in plain[0]["net"].values())
    for worker in ours:
        assert worker["steps"] == 4, "one exchange for two passes"
        assert worker["sent"] > 4 * 4 * elements, "gradients went through the shards"


def test_the_trainer_goes_on_to_the_bit(shards, workers, tmp_path):
    straight = workers.run(shards(), 2, frameworks.hugging_face, str(tmp_path / "run"), jobs.SPARSE, 6)
    kept = tmp_path / "run" / "checkpoint-3"
    assert {path.name for path in kept.glob("arc_topk_*")} == {"arc_topk_0.pt", "arc_topk_1.pt"}
    resumed = workers.run(shards(), 2, frameworks.hugging_face, str(tmp_path / "again"), jobs.SPARSE, 6, str(kept))
    for a, b in zip(straight, resumed, strict=True):
        assert same(a["net"], b["net"]) and same(a["arc"]["arrays"], b["arc"]["arrays"])
        assert any(values.any() for values in a["arc"]["arrays"].values()), "there is feedback to restore"
        assert (a["arc"]["step"], b["arc"]["step"], b["steps"]) == (6, 6, 3)
    # Without the files: from the same parameters, but with no feedback.
    for path in kept.glob("arc_topk_*"):
        path.unlink()
    without = workers.run(shards(), 2, frameworks.hugging_face, str(tmp_path / "without"), jobs.SPARSE, 6, str(kept))
    assert not same(without[0]["net"], straight[0]["net"]) and without[0]["arc"]["step"] == 3
    assert any("has no feedback state" in said for said in without[0]["said"])


def test_the_trainers_last_checkpoint_and_a_second_course(shards, workers, tmp_path):
    directory = str(tmp_path)
    workers.run(shards(), 2, frameworks.hugging_face, directory, jobs.SPARSE, 3)
    got = workers.run(shards(), 2, frameworks.hugging_face, directory, jobs.SPARSE, 5, True)
    assert (got[0]["arc"]["step"], got[0]["steps"]) == (5, 2)
    got = workers.run(shards(), 2, frameworks.hugging_face, str(tmp_path / "two"), jobs.SPARSE, 2, None, 2)
    assert same(got[0]["net"], got[1]["net"]) and got[0]["steps"] == 4


@pytest.mark.parametrize("optim", ["catch-up", "adamw_torch"])
def test_the_trainers_adam(shards, workers, tmp_path, optim):
    settings = jobs.SPARSE | {"warmup_updates": 1}
    got = workers.run(shards(), 2, frameworks.hugging_face, str(tmp_path), settings, 4, None, 1, optim)
    assert same(got[0]["net"], got[1]["net"])
    warned = ["use arc_topk.optim.AdamW" in said for said in got[0]["said"]]
    assert warned == ([] if optim == "catch-up" else [True])


def test_feedback_files_serve_another_number_of_workers(tmp_path):
    states = [{"step": 7, "update": 6, "arrays": {"residual/w": torch.arange(4.0) + 10 * rank}} for rank in range(2)]
    for rank, state in enumerate(states):
        torch.save({"world_size": 2, "state": state}, tmp_path / f"arc_topk_{rank}.pt")
    for world in (1, 2, 3):
        for rank in range(world):
            got: Any = hf._restored(tmp_path, Place(rank, world, rank, world))
            wanted = arc_topk.merge_states(states, rank, world)
            assert (got["step"], got["update"]) == (7, 6)
            assert torch.equal(got["arrays"]["residual/w"], wanted["arrays"]["residual/w"])
    assert hf._restored(tmp_path / "none", Place(0, 2, 0, 2)) is None
    # The same processes, now two to a machine: one worker.
    alone: Any = hf._restored(tmp_path, Place(1, 2, 0, 1))
    assert torch.equal(alone["arrays"]["residual/w"], arc_topk.merge_states(states, 0, 1)["arrays"]["residual/w"])


def test_a_trainer_that_is_alone_is_told_how_to_start(tmp_path):
    alone = frameworks.trainer(str(tmp_path), 1)
    hf.register(alone, density=0.5)
    with pytest.raises(arc_topk.ConfigError, match="arc-worker local"):
        alone.train()
    with pytest.raises(TypeError, match="densty"):
        hf.register(alone, densty=0.5)


def test_accelerate_needs_one_line(shards, workers):
    plain = workers.run(shards(), 2, frameworks.accelerate, None, 3)
    ours = workers.run(shards(), 2, frameworks.accelerate, jobs.LOSSLESS, 3)
    assert same(ours[0]["net"], ours[1]["net"]) and close(ours[0]["net"], plain[0]["net"])
    assert ours[0]["steps"] == 3, "one exchange for two passes"


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_does_what_it_does_alone(shards, workers, tmp_path, package):
    plain = workers.run(shards(), 2, frameworks.lightning, str(tmp_path), None, 2, None, 1, package)
    ours = workers.run(shards(), 2, frameworks.lightning, str(tmp_path), jobs.LOSSLESS, 2, None, 1, package)
    assert same(ours[0]["net"], ours[1]["net"]) and close(ours[0]["net"], plain[0]["net"])
    elements = sum(value.numel() for value in plain[0]["net"].values())
    for worker in ours:
        assert worker["steps"] == 6, "one exchange for two passes"
        assert worker["sent"] > 6 * 4 * elements, "gradients went through the shards"


def test_lightning_goes_on_to_the_bit(shards, workers, tmp_path):
    straight = workers.run(shards(), 2, frameworks.lightning, str(tmp_path / "straight"), jobs.SPARSE, 3)
    workers.run(shards(), 2, frameworks.lightning, str(tmp_path / "first"), jobs.SPARSE, 1)
    kept = str(tmp_path / "first" / "last.ckpt")
    resumed = workers.run(shards(), 2, frameworks.lightning, str(tmp_path / "second"), jobs.SPARSE, 3, kept)
    for a, b in zip(straight, resumed, strict=True):
        assert same(a["net"], b["net"]) and same(a["arc"]["arrays"], b["arc"]["arrays"])
        assert any(values.any() for values in a["arc"]["arrays"].values()), "there is feedback to restore"
        assert (a["arc"]["step"], b["arc"]["step"], b["steps"]) == (9, 9, 6)
    # With another number of workers: all take from what all had.
    three = workers.run(shards(2, 3), 3, frameworks.lightning, str(tmp_path / "third"), jobs.SPARSE, 2, kept)
    assert same(three[0]["net"], three[2]["net"]) and three[2]["arc"]["step"] == 6
    # Without feedback in it.
    settings = jobs.SPARSE | {"save_feedback": False}
    workers.run(shards(), 2, frameworks.lightning, str(tmp_path / "empty"), settings, 1)
    assert "arc_topk" not in torch.load(tmp_path / "empty" / "last.ckpt", weights_only=True)["callbacks"]


def test_processes_of_a_machine_under_a_framework(shards, workers, tmp_path):
    settings = jobs.SPARSE | {"local_group": "node"}
    straight = workers.run(shards(1, 1), 2, frameworks.hugging_face, str(tmp_path / "run"), settings, 5)
    kept = str(tmp_path / "run" / "checkpoint-3")
    resumed = workers.run(shards(1, 1), 2, frameworks.hugging_face, str(tmp_path / "again"), settings, 5, kept)
    for process in (*straight, *resumed):
        assert same(process["net"], straight[0]["net"]) and process["arc"]["step"] == 5
    assert [bool(process["arc"]["arrays"]) for process in resumed] == [True, False]

    straight = workers.run(shards(1, 1), 2, frameworks.lightning, str(tmp_path / "straight"), settings, 2)
    workers.run(shards(1, 1), 2, frameworks.lightning, str(tmp_path / "first"), settings, 1)
    kept = str(tmp_path / "first" / "last.ckpt")
    resumed = workers.run(shards(1, 1), 2, frameworks.lightning, str(tmp_path / "second"), settings, 2, kept)
    for process in (*straight, *resumed):
        assert same(process["net"], straight[0]["net"]) and process["arc"]["step"] == 6
    assert resumed[0]["sent"] > 0 and resumed[1]["sent"] == 0


def test_lightning_fits_twice(shards, workers, tmp_path):
    got = workers.run(shards(), 2, frameworks.lightning, str(tmp_path), jobs.SPARSE, 1, None, 2)
    assert same(got[0]["net"], got[1]["net"])
    assert got[0]["steps"] == 3, "each course is a job"


def test_no_framework_is_imported_unasked(tmp_path):
    imported = subprocess.run(
        [sys.executable, "-c", "import sys, arc_topk; print(sorted({name.split('.')[0] for name in sys.modules}))"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    modules = set(ast.literal_eval(imported))
    assert "arc_topk" in modules
    assert not modules & {"transformers", "accelerate", "lightning", "pytorch_lightning"}


def test_a_checkpoint_that_lacks_files_of_other_workers_is_refused(tmp_path):
    torch.save({"world_size": 3, "state": {}}, tmp_path / "arc_topk_0.pt")
    with pytest.raises(arc_topk.ConfigError, match=r"lacks arc_topk_1\.pt, arc_topk_2\.pt"):
        hf._restored(tmp_path, Place(0, 2, 0, 2))
