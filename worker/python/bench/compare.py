"""Losses and bytes side by side: dense all-reduce, PyTorch's bf16 hook, PowerSGD, and arc at several densities and wire types.

    python bench/compare.py --task text --task reviews --out runs/compare

All runs of a task have equal seeds, data and steps; each method is taken at the best of three learning rates (by the mean, with
--seeds of more than one: the table then says how far they lie apart). Four workers share
this machine, one after the other for each method, so losses and bytes say something here and times do not. Bytes are those that
the kernel counted on loopback, as one worker's link would carry them, both ways. A run that is in the results
file already is not made again: what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import fashion
import gpt
import loopback
import reviews
import training

import arc_topk
from arc_topk import _native
from arc_topk.local import environments

#: By name: the example, three learning rates, and settings in which a run differs from the example's defaults.
TASKS: dict[str, tuple[Any, Any, tuple[float, ...], list[str]]] = {
    "text": (gpt.arguments, gpt.TASK, (0.0005, 0.001, 0.002), []),
    "reviews": (reviews.arguments, reviews.TASK, (3e-5, 1e-4, 3e-4), []),
    "fashion": (fashion.arguments, fashion.TASK, (0.001, 0.002, 0.004), []),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of averaging, as the table names it and as the examples take it."""

    name: str
    settings: str

    @staticmethod
    def arc(density: float, wire: str, more: str = "") -> Way:
        kind = "AdamW" if "--plain-adam" in more else "catch-up"
        rows = " pooled" if "pooled" in more else ""
        rows += ", word embeddings 0.02" if "--densities" in more else ""
        return Way(f"arc {density:g} {wire}{rows}, {kind}", f"--method arc --density {density} --wire {wire} {more}".strip())


WAYS = (
    Way("all-reduce f32", "--method gloo"),
    Way("all-reduce bf16", "--method bf16"),
    Way("PowerSGD rank 32", "--method powersgd --rank 32"),
    Way("PowerSGD rank 4", "--method powersgd --rank 4"),
    Way.arc(0.4, "int4"),
    Way.arc(0.2, "bf16"),
    Way.arc(0.2, "int8"),
    Way.arc(0.2, "int4"),
    Way.arc(0.2, "int4", "--plain-adam"),
    Way.arc(0.1, "int4", "--selection pooled"),
    Way.arc(0.05, "int4"),
    Way.arc(0.05, "int4", "--plain-adam"),
    Way.arc(0.02, "int4"),
)

#: What a task has besides. A step of the reviews touches a hundredth of the word embeddings, which are half of the model: what is
#: saved there goes to the other tensors.
EMBEDDINGS = "--densities *word_embeddings*=0.02"
MORE_WAYS = {"reviews": tuple(Way.arc(density, "int4", EMBEDDINGS) for density in (0.3, 0.25, 0.1))}


def ways(task: str) -> tuple[Way, ...]:
    """Those of a task."""
    return WAYS + MORE_WAYS.get(task, ())


class Pool:
    """Worker processes that make one run after the other: most of a process's start is importing torch."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs,), daemon=True).start()
            self._links.append(ours)

    def run(self, task: str, args: argparse.Namespace) -> training.Result:
        """One run; the first worker's result."""
        workers = len(self._links)
        with tempfile.TemporaryDirectory(prefix="arc-certs-") as directory:
            shards = _native.LocalShards(directory, "compare", 2, workers)
            try:
                for link, environment in zip(self._links, environments(shards, "compare", workers), strict=True):
                    link.send((environment, task, args))
                answers = [link.recv() for link in self._links]
            finally:
                shards.stop()
        for rank, (error, _) in enumerate(answers):
            if error is not None:
                raise RuntimeError(f"worker {rank}:\n{error}")
        result: training.Result = answers[0][1]
        return result


def serve(link: Connection) -> None:
    """A worker process."""
    logging.getLogger("arc_topk").setLevel(logging.ERROR)
    while True:
        try:
            environment, task, args = link.recv()
        except EOFError:
            return
        os.environ.update(environment)
        arc_topk.init()
        try:
            link.send((None, training.train(args, TASKS[task][1])))
        except BaseException:  # noqa: BLE001 - raised by the parent
            link.send((traceback.format_exc(), None))


def runs(task: str, seeds: int, given: Sequence[str]) -> Iterator[tuple[str, float, argparse.Namespace]]:
    """Name of the way, learning rate and settings of each run."""
    arguments, _, rates, own = TASKS[task]
    for way in ways(task):
        for seed in range(seeds):
            for rate in rates:
                words = [*own, *way.settings.split(), f"--lr={rate}", f"--seed={seed}", *given]
                yield way.name, rate, arguments().parse_args(words)


def key(task: str, name: str, args: argparse.Namespace) -> str:
    """What makes a run the same as another."""
    return json.dumps([task, name, vars(args)], sort_keys=True)


def loss_of(runs: list[dict[str, Any]]) -> float:
    """Mean over the seeds. A run that came apart is the worst."""
    loss = statistics.fmean(float(run["validation"]["loss"]) for run in runs)
    return math.inf if math.isnan(loss) else loss


def cell(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def table(task: str, results: list[dict[str, Any]]) -> str:
    """Each way at its best rate, as Markdown."""
    by_rate: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_rate[result["name"], result["lr"]].append(result)
    best: dict[str, list[dict[str, Any]]] = {}
    # A rate that has had more seeds is the one that was chosen for them: means over different seeds cannot be compared.
    for (name, _), alike in by_rate.items():
        if name not in best or (-len(alike), loss_of(alike)) < (-len(best[name]), loss_of(best[name])):
            best[name] = alike
    measures = list(results[0]["validation"])
    dense = best.get(WAYS[0].name)
    lines = [
        f"| {task} | " + " | ".join(measures) + " | seeds | learning rate | kB a step | fewer bytes | MB of the whole run |",
        "|" + "---|" * (len(measures) + 6),
    ]
    for way in ways(task):
        if way.name not in best:
            continue
        seeds = best[way.name]
        row = seeds[0]
        values = " | ".join(cell([run["validation"][measure] for run in seeds]) for measure in measures)
        fewer = f"{dense[0]['bytes_per_step'] / row['bytes_per_step']:.1f}" if dense else ""
        lines.append(
            f"| {way.name} | {values} | {len(seeds)} | {row['lr']:g} | {row['bytes_per_step'] / 1e3:.1f} | {fewer} "
            f"| {row['bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be given several times (default: text, reviews)")
    parser.add_argument("--way", action="append", default=[], help="only ways whose names hold this; may be given several times")
    parser.add_argument(
        "--rate", action="append", type=float, default=[], help="only these learning rates; may be given several times"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way and rate, with seeds from 0 on (default: 1)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="where results are kept (default: runs/compare)")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results that are there")
    parser.add_argument("more", nargs="*", help="settings of the examples, after --: -- --steps 50")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    alone = loopback.isolate()
    if not alone:
        print("bytes are those of this machine's loopback: whatever else talks over it is counted, too", file=sys.stderr)
    pool = None
    for task in args.task or ["text", "reviews"]:
        file = args.out / f"{task}.jsonl"
        results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        known = {result["key"] for result in results}
        todo = list(runs(task, args.seeds, [f"--workers={args.workers}", *args.more]))
        for at, (name, rate, settings) in enumerate(todo):
            identity = key(task, name, settings)
            asked = (not args.way or any(part in name for part in args.way)) and (not args.rate or rate in args.rate)
            if args.table or identity in known or not asked:
                continue
            pool = pool or Pool(args.workers)
            begun = time.monotonic()
            result = pool.run(task, settings)
            row = {"key": identity, "name": name, "lr": rate, **dataclasses.asdict(result)}
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            results.append(row)
            print(
                f"{task} {at + 1}/{len(todo)}: {name}, lr {rate:g}, seed {settings.seed}: {result.validation}, "
                f"{result.bytes_per_step / 1e3:.1f} kB a step, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
        # Not those with other settings, which the file may hold as well.
        wanted = {key(task, name, settings) for name, _, settings in todo}
        results = [result for result in results if result["key"] in wanted]
        if results:
            text = table(task, results)
            (args.out / f"{task}.md").write_text(text)
            print(text)


if __name__ == "__main__":
    main()
