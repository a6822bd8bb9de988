"""What a worker holds beside the gradients."""

from __future__ import annotations

import footprint

# 64 MB of float32: what is no matter of its size, such as threads, buffers of QUIC and the projection, is small beside it.
ROWS, WIDTH = 4096, 4096
FEW = {"warmup_updates": 0, "density": 0.02}
# Of a gradient's size. A copy would be 1.
SMALL = 0.3


def grown(shards, workers, dtype: str, settings) -> tuple[float, list[float]]:
    """Growth in the first step, which makes what is kept, and in each of the later ones."""
    first, *later = workers.run(shards(1, 1), 1, footprint.growth, ROWS, WIDTH, dtype, settings)[0]
    return first, later


def test_a_gradient_is_not_copied(shards, workers):
    """U is formed in the gradient's own memory, so that the residual is all that is kept."""
    first, later = grown(shards, workers, "float32", FEW)
    assert 1.0 <= first < 1.0 + SMALL, f"ef14 keeps one residual of the gradient's size: {first}"
    assert max(later) < SMALL, f"later steps need next to nothing: {later}"


def test_without_feedback_nothing_is_kept(shards, workers):
    first, later = grown(shards, workers, "float32", FEW | {"feedback": "none"})
    assert max(first, *later) < SMALL, f"{first}, {later}"


def test_of_other_types_a_step_takes_one_copy(shards, workers):
    """Beyond the residual: the gradient as float32, which is where U and the result lie."""
    first, later = grown(shards, workers, "bfloat16", FEW)
    assert first < 2.0 + SMALL, f"{first}"
    assert max(later) < 1.0 + SMALL, f"{later}"
