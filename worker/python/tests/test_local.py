"""Jobs on one machine, and local steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import arc_topk
import jobs

SCRIPT = """
import sys
import torch
import arc_topk

net = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), density=1.0)
for step in range(3):
    optimizer.zero_grad()
    net(torch.full((2, 8), float(arc_topk.rank() + step))).square().mean().backward()
    optimizer.step()
digest = sum(float(p.detach().double().sum()) for p in net.parameters())
# In one piece: the other worker may write at the same moment.
sys.stdout.write(f"rank {arc_topk.rank()} digest {digest!r}\\n")
"""


def test_a_function_becomes_a_job():
    got = arc_topk.local(jobs.at_home, 4, workers=3, shards=2)
    assert [rank for rank, _, _ in got] == [0, 1, 2]
    assert all(world == 3 for _, world, _ in got)
    # What they return are tensors, whose processes have ended.
    assert all(torch.equal(one, other) for _, _, values in got for one, other in zip(values, got[0][2], strict=True))


def test_an_error_of_a_worker_is_raised():
    with pytest.raises(arc_topk.ArcError, match=r"worker 1 failed:(.|\n)*ZeroDivisionError"):
        arc_topk.local(jobs.fails_at_home, workers=2, shards=1)


@pytest.mark.parametrize("launcher", ["arc-worker", "torchrun"])
def test_a_script_becomes_a_job(shards, tmp_path: Path, launcher):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ARC_")}
    if launcher == "torchrun":
        job = shards(2, 2)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment |= job.environment()
    else:
        binary = Path(os.environ["ARC_BIN"]) / "arc-worker"
        command = [str(binary), "local", "--workers=2", "--shards=2", "--admin=off", f"--run-dir={tmp_path / 'run'}"]
        command += ["--", sys.executable]
    run = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    said = run.stdout + run.stderr
    lines = sorted({line[line.index("rank ") :] for line in said.splitlines() if "rank " in line and "digest " in line})
    assert [line.split()[1] for line in lines] == ["0", "1"], said
    assert len({line.split("digest ")[1] for line in lines}) == 1, lines


@pytest.mark.parametrize("launcher", ["arc-worker", "torchrun"])
def test_the_quickstart_trains_and_goes_on_from_its_checkpoint(shards, tmp_path: Path, launcher):
    script = Path(__file__).parents[1] / "examples" / "quickstart.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ARC_")}
    for steps in (50, 100):
        if launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            environment |= shards(1, 2).environment()
        else:
            binary = Path(os.environ["ARC_BIN"]) / "arc-worker"
            command = [str(binary), "local", "--workers=2", "--admin=off", f"--run-dir={tmp_path / 'run'}", "--restart=never"]
            command += ["--", sys.executable]
        more = [str(script), f"--steps={steps}", f"--checkpoint={tmp_path / 'saved'}"]
        run = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=240, check=False)
        said = run.stdout + run.stderr
        assert run.returncode == 0, said
        assert f"step {steps}: loss" in said and "times fewer bytes" in said, said
    assert "step 50:" not in said, "it went on from its checkpoint"


def test_local_steps_average_what_workers_changed(shards, workers):
    got = workers.run(shards(), 2, jobs.local_steps, 4, 3)
    # The same, alone: two copies that are averaged after every fourth step.
    copies = [jobs.model(), jobs.model()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in copies]
    for step in range(12):
        for rank, (net, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            optimizer.zero_grad()
            jobs.loss_of(net, rank, step).backward()
            optimizer.step()
        if step % 4 == 3:
            with torch.no_grad():
                for a, b in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
                    a.copy_((a + b) / 2)
                    b.copy_(a)
    for ours, other, alone in zip(got[0]["values"], got[1]["values"], copies[0].parameters(), strict=True):
        assert torch.equal(ours, other)
        assert torch.allclose(ours, alone, rtol=1e-4, atol=1e-6)
    assert got[0]["steps"] == 3, "rounds, not steps"


def test_local_steps_with_compression_learn(shards, workers):
    got = workers.run(shards(), 2, jobs.local_diloco, 600)
    assert all(torch.equal(a, b) for a, b in zip(got[0]["values"], got[1]["values"], strict=True))
    assert got[0]["losses"][-1] < 0.9 * got[0]["losses"][0]
