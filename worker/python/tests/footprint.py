"""What a worker process holds in memory; each function returns plain numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import arc_topk

STEPS = 4


def status(name: str) -> int:
    """Bytes that the kernel counts for this process: ``VmRSS``, or ``VmHWM``, the most of it since :func:`reset_peak`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def growth(_rank: int, rows: int, width: int, dtype: str, settings: dict[str, Any]) -> list[float]:
    """How much the peak of memory grows in the first step, and in those after it, in sizes of a float32 gradient."""
    gradient = torch.randn(rows, width).to(getattr(torch, dtype))
    grown = []
    for _ in range(STEPS):
        reset_peak()
        before = status("VmRSS")
        arc_topk.all_reduce({"gradient": gradient}, **settings)
        grown.append((status("VmHWM") - before) / (4 * rows * width))
    arc_topk.shutdown()
    return grown
