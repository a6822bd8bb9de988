"""torch.compile with the backend that it takes unless told otherwise: inductor, which writes C++ and has it compiled."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import arc_topk
import jobs
import practices


@functools.cache
def _why_not() -> str | None:
    """Why inductor cannot work here, if it cannot."""
    from torch._inductor import cpp_builder, exc  # noqa: PLC0415 - only where it is needed

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no C++ compiler is here (g++, clang++, or what CXX names), and inductor needs one"
    return None


class Net(nn.Module):
    """A class of the user's: within DDP, those of torch.nn alone would not be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = jobs.model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def compiled(rank: int, form: str, steps: int, cache: str) -> dict[str, Any]:
    """Steps of a compiled model, its graphs, and how many libraries the compiler made of them."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{rank}"
    torch._dynamo.reset()
    counters.clear()
    try:
        with jobs.process_group() if form == "ddp" else contextlib.nullcontext():
            net = Net()
            net_or_ddp, optimizer = practices._wrapped(net, form, jobs.LOSSLESS)
            fast: Any = torch.compile(net_or_ddp)
            for step in range(steps):
                optimizer.zero_grad()
                jobs.loss_of(fast, rank, step).backward()
                optimizer.step()
            arc_topk.shutdown()
            libraries = len(list(Path(cache, str(rank)).rglob("*.so")))
            return {"net": dict(net.layers.state_dict()), "graphs": counters["stats"]["unique_graphs"], "libraries": libraries}
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where compiled libraries lie. Both forms have the same, so that what takes most of the time is done once."""
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.mark.parametrize("form", ["ddp", "wrapper"])
def test_inductor(shards, workers, cache, form):
    if (why := _why_not()) is not None:
        pytest.skip(why)
    got = workers.run(shards(), 2, compiled, form, 4, cache)
    plain = workers.run(shards(), 2, jobs.wrapper_unclipped, jobs.LOSSLESS, 4)
    for worker in got:
        assert worker["graphs"] == 1, "the model is one graph"
        assert worker["libraries"] >= 2, "its forward and backward were compiled"
    for name, value in plain[0].items():
        assert torch.equal(got[0]["net"][name], got[1]["net"][name]), name
        assert torch.allclose(got[0]["net"][name], value, rtol=1e-4, atol=2e-6), name
