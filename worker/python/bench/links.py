"""Step times over links of a rate, a delay and a loss: all-reduce, bf16, PowerSGD and arc side by side, and what hides nothing.

    sudo python bench/links.py                                                    an hour: LLaMA-60M, 4 workers, five rates
    sudo python bench/links.py --rates 200mbit,1gbit --arms dense,powersgd-4,arc-0.2-int4
    sudo python bench/links.py --rates 200mbit --delays 0,10,50 --losses 0,0.1,1      milliseconds a round trip, per cent

Every worker is a process on a host of its own (a network namespace) with a link of its own, which its shard shares. What a step
takes beyond the control (DDP with the same model, whose gradients go nowhere) is communication: waiting, compression, everything.
Links are shaped once a job has started, so that broadcasting parameters takes no time. What was measured already (results.jsonl)
is not measured again. The model has the shapes of a LLaMA and a backward that costs little. Arms:

    none                control, always measured
    dense, bf16         DDP over gloo, and PyTorch's bf16 hook
    powersgd-RANK       PyTorch's PowerSGD hook
    shards              dense averaging through the shards
    arc-DENSITY-WIRE    arc_topk.register(density=…, wire_up=wire_down=…)
    auto-DENSITY-WIRE   the same with mode="auto": that, or all-reduce, whichever is faster; what it chose is in results.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lab import report
from lab.job import Job, Setting, machine
from lab.network import LabError, Link, Network, check
from shapes import shape_of

ARMS = "dense,bf16,powersgd-4,powersgd-32,shards,arc-0.05-bf16,arc-0.2-int4"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def rate_of(text: str) -> float | None:
    """``200mbit``, ``1gbit``, or ``none`` for links that are not shaped."""
    if text == "none":
        return None
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise argparse.ArgumentTypeError(f"{text!r} is no rate: 200mbit, 1gbit, none")


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Several of a kind, with commas between."""
    return lambda text: [kind(part) for part in text.split(",")]


def shape(name: str) -> str:
    """A name of a shape."""
    try:
        shape_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", type=listed(str), default=ARMS.split(","), help=f"(default: {ARMS})")
    add("--shape", type=shape, default="60m", help="of LLaMA: 60m, 130m, 350m, 1b, or with fewer layers as 1b-12 (default: 60m)")
    add("--workers", type=listed(int), default=[4], help="(default: 4)")
    add("--shards", type=int, default=0, help="0: one for each worker (default)")
    add("--apart", action="store_true", help="shards on hosts of their own")
    add("--rates", type=listed(rate_of), default="100mbit,200mbit,1gbit,10gbit,none", help="of each link (default: %(default)s)")
    add("--delays", type=listed(float), default=[0.0], help="milliseconds that a round trip takes longer (default: 0)")
    add("--losses", type=listed(float), default=[0.0], help="per cent of packets that are lost (default: 0)")
    add("--settle", type=int, default=2, help="steps after a change of the links that are not measured (default: 2)")
    add("--steps", type=int, default=12, help="measured, at most (default: 12)")
    add("--seconds", type=float, default=20.0, help="for which they are measured; two steps at least (default: 20)")
    add("--programs", type=Path, required=True, help="directory of arc-ps")
    add("--out", type=Path, default=Path("runs/links"), help="(default: runs/links)")
    args = parser.parse_args()
    if not (args.programs / "arc-ps").is_file():
        parser.error(f"--programs: there is no arc-ps in {args.programs}; cargo build --release --locked --bins")
    return args


def links(args: argparse.Namespace) -> Iterator[Link]:
    """Rates without anything else, then delays and losses, one at a time: not all with all."""
    extras = [(0.0, 0.0)]
    extras += [(delay, 0.0) for delay in args.delays if delay] + [(0.0, loss / 100) for loss in args.losses if loss]
    for (delay, loss), rate in itertools.product(extras, args.rates):
        yield Link(rate, delay, loss)


class Results:
    """A file of records."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[report.Record] = []
        if path.exists():
            self.records = [json.loads(line) for line in path.read_text().splitlines()]

    def of(self, setting: Setting) -> list[report.Record]:
        """Those of a setting."""
        return [record for record in self.records if report.setting_of(record) == dataclasses.astuple(setting)]

    def has(self, setting: Setting, link: Link, arm: str) -> bool:
        """Whether it was measured."""
        return any(record["arm"] == arm and report.link_of(record) == link for record in self.of(setting))

    def add(self, record: report.Record) -> None:
        """Keeps a record."""
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def measure(args: argparse.Namespace, setting: Setting, results: Results) -> None:
    """Every arm over every link that is not in the results yet."""
    arms = [report.CONTROL, *(arm for arm in args.arms if arm != report.CONTROL)]
    for forwarded, arm in itertools.product((False, True), arms):
        wanted = [link for link in links(args) if bool(link.delay) == forwarded and not results.has(setting, link, arm)]
        if not wanted:
            continue
        print(f"{setting.words}: {arm}", file=sys.stderr, flush=True)
        with Network(setting.hosts, forwarded=forwarded) as network, Job(network, setting, arm, args.programs, args.out) as job:
            for link in wanted:
                measured = job.measure(link, args.settle, args.steps, args.seconds)
                place = dataclasses.asdict(setting)
                where = {"arm": arm, "rate": link.rate, "delay": link.delay, "loss": link.loss}
                results.add(place | where | measured | {"gradient": job.gradient_bytes})
                said = f"  {link.words}: {measured['seconds']:.3f} s a step, {measured['sent'] / 1e6:.2f} MB"
                print(said, file=sys.stderr, flush=True)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        check(list(links(args)))
        results = Results(args.out / "results.jsonl")
        settings = [Setting(args.shape, workers, args.shards or workers, not args.apart) for workers in args.workers]
        for setting in settings:
            measure(args, setting, results)
    except LabError as error:
        raise SystemExit(f"links: {error}") from None
    text = f"Measured on {', '.join(machine())}, torch {torch.__version__}; all hosts share the machine.\n"
    for setting in settings:
        own = results.of(setting)
        text += report.table(own, setting.words) + "\n" + report.crossovers(own)
        name = f"links-{setting.shape}-{setting.workers}{'-apart' if args.apart else ''}.png"
        report.plot(own, setting.words, args.out / name)
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
