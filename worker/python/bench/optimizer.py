"""Catch-up AdamW beside torch's AdamW, on the shapes of a small transformer.

    python bench/optimizer.py --threads 1 --dtype float32

Prints milliseconds per step (the median) and the ratio to torch's foreach form, all measured in turns within one run. Where rows
come at a density below 1, torch's AdamW, which knows of no rows, does what it always does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from arc_topk import optim


def shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameters of a GPT with biases and norms."""
    layer = [
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    norms = [(width,)] * 4
    return [(vocabulary, width), *(layer + norms) * layers, (width,), (width,), (vocabulary, width)]


def parameters(of: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in of:
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(dtype))
        parameter.grad = torch.randn(shape, generator=generator).to(dtype)
        made.append(parameter)
    return made


def rows_of(model: list[torch.nn.Parameter], density: float) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """Says of each parameter which rows come, others in every step."""
    if density == 1.0:
        return lambda _: None
    generator = torch.Generator().manual_seed(1)
    choices: dict[int, list[torch.Tensor]] = {}
    for parameter in model:
        if parameter.dim() > 1:
            rows = parameter.shape[0]
            orders = [torch.randperm(rows, generator=generator) for _ in range(8)]
            choices[id(parameter)] = [order[: max(1, int(density * rows))].sort().values for order in orders]
    asked: dict[int, int] = dict.fromkeys(choices, 0)

    def fresh(parameter: torch.Tensor) -> torch.Tensor | None:
        own = choices.get(id(parameter))
        if own is None:
            return None
        asked[id(parameter)] += 1
        return own[asked[id(parameter)] % len(own)]

    return fresh


def measured(of: list[tuple[int, ...]], density: float, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of a step."""
    makers: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "torch foreach": lambda model: torch.optim.AdamW(model, foreach=True),
        "torch fused": lambda model: torch.optim.AdamW(model, fused=True),
        "torch, each tensor": lambda model: torch.optim.AdamW(model, foreach=False, fused=False),
        "catch-up fused (the default)": lambda model: optim.AdamW(model, fused=True),
        "catch-up foreach": lambda model: optim.AdamW(model, foreach=True),
        "catch-up, each tensor": lambda model: optim.AdamW(model, foreach=False, fused=False),
    }
    models = {name: parameters(of, dtype) for name in makers}
    optimizers = {name: make(models[name]) for name, make in makers.items()}
    fresh = {name: rows_of(model, density) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for repeat in range(repeats + 2):
        for name, optimizer in optimizers.items():
            with mock.patch.object(optim, "fresh_rows", fresh[name]):
                begun = time.perf_counter()
                optimizer.step()
                took = time.perf_counter() - begun
            if repeat >= 2:
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--densities", default="1,0.2,0.05")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    of = shapes(args.width, args.layers, args.vocabulary)
    elements = sum(torch.Size(shape).numel() for shape in of)
    print(f"{elements / 1e6:.1f} M parameters of {args.dtype} in {len(of)} tensors, {args.threads} thread(s), {args.repeats} steps")
    for density in map(float, args.densities.split(",")):
        got = measured(of, density, getattr(torch, args.dtype), args.repeats)
        print(f"\n| rows that come: {density:.0%} | ms per step | against torch foreach |\n|---|---|---|")
        for name, seconds in got.items():
            print(f"| {name} | {1e3 * seconds:.2f} | {seconds / got['torch foreach']:.2f} |")


if __name__ == "__main__":
    main()
