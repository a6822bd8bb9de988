"""Gradients that stay on their GPU. What needs one is skipped without: `make gpu-check` runs it where one is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import arc_topk
import gpu_runs
import jobs
from arc_topk import Config, ConfigError, _gpu

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_the_cpu_compresses_what_lies_there():
    assert _gpu.chosen([torch.zeros(3)], Config()) is None
    assert _gpu.chosen([torch.zeros(3)], Config(device="cpu")) is None
    with pytest.raises(ConfigError, match="device is 'gpu': it must be"):
        _gpu.chosen([torch.zeros(3)], Config(device="gpu"))
    with pytest.raises(ConfigError, match=r"the tensors are on cpu, not on one GPU: .* device='cpu'"):
        _gpu.chosen([torch.zeros(3)], Config(device="cuda"))


def test_a_gpu_that_is_not_there_is_named_with_its_remedy():
    with pytest.raises(ConfigError, match=r"(?s)(no CUDA driver|there is no GPU|no GPU can be used|driver is of).*CPU"):
        arc_topk._native.gpu_name(4096)


class Recorded:
    """A session that notes what it is lent."""

    def __init__(self, elsewhere: list[tuple[int, bytes]]) -> None:
        self.lent: list[tuple[Any, ...]] = []
        self.elsewhere = elsewhere

    def lend_on_device(self, *what: Any) -> None:
        self.lent.append(what)

    def results(self, targets: Any, factor: float, on_device: list[int], stream: int) -> list[tuple[int, bytes]]:
        assert (targets, factor, on_device, stream) == ([], 2.0, [0, 1], 7)
        # What the worker leaves in the memory that was lent.
        for _, owner, *_ in self.lent:
            owner.fill_(3.0)
        return self.elsewhere


def test_lent_tensors_hold_the_results_wherever_these_come_from(monkeypatch):
    """The Python half, on tensors of the CPU in place of a GPU's."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": 7}))
    late = torch.arange(12.0).numpy().tobytes()
    session: Any = Recorded([(1, late)])
    # One whose elements lie apart, and one with channels last, which is dense.
    apart, last = torch.ones(4, 8)[:, ::2], torch.ones(1, 3, 2, 2).to(memory_format=torch.channels_last)
    lent = {0: _gpu.lend(session, 0, apart, 2.0), 1: _gpu.lend(session, 1, last, 2.0)}
    assert lent[1].data_ptr() == last.data_ptr() and lent[0].data_ptr() != apart.data_ptr()
    assert [what[0] for what in session.lent] == [0, 1] and float(last.mean()) == 0.5
    _gpu.take(session, [], 2.0, torch.device("cpu"), [(0, apart), (1, last)], lent)
    assert torch.equal(apart, torch.full((4, 4), 6.0))
    # As they lie in memory, which is channels last.
    assert torch.equal(last.permute(0, 2, 3, 1).reshape(-1), torch.arange(12.0) * 2.0)


@GPU
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["ddp", "wrapper"])
def test_training_on_a_gpu_is_that_on_the_cpu(shards, workers, form, dtype, scaled):
    on_gpu = workers.run(shards(), 2, gpu_runs.trained, "cuda", form, jobs.SPARSE, dtype, scaled)
    assert on_gpu[0]["gpu"] == 0
    for a, b in zip(on_gpu[0]["parameters"], on_gpu[1]["parameters"], strict=True):
        assert torch.equal(a, b)
    on_cpu = workers.run(shards(), 2, gpu_runs.trained, "cpu", form, jobs.SPARSE, dtype, False)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for a, b in zip(on_gpu[0]["parameters"], on_cpu[0]["parameters"], strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    assert on_gpu[0]["state"]["arrays"].keys() == on_cpu[0]["state"]["arrays"].keys()
