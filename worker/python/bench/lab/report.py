"""Tables and plots of what links.py measured."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .network import Link

Record = dict[str, Any]
CONTROL = "none"
#: Bytes and the links' use are those of the busiest host, processor time that of all workers and of all shards.
COLUMNS = ("arm", "step (s)", "communication (s)", "of dense", "MB sent a step", "wire / payload", "link use", "cpu (s)")
#: What others are compared with.
PEERS = ("dense", "bf16", "powersgd-4", "powersgd-32")


def link_of(record: Record) -> Link:
    """Of a record."""
    return Link(record["rate"], record["delay"], record["loss"])


def setting_of(record: Record) -> tuple[Any, ...]:
    """What records must have in common to stand in one table."""
    return record["shape"], record["workers"], record["shards"], record["colocated"]


def communication(record: Record, control: Record) -> float:
    """Seconds of a step that the control does not take."""
    return float(record["seconds"] - control["seconds"])


def table(records: Sequence[Record], words: str) -> str:
    """Of one setting: a part for each link."""
    lines = [f"\n## {words}\n"]
    for link in sorted({link_of(record) for record in records}, key=order):
        own = {record["arm"]: record for record in records if link_of(record) == link}
        control = own.get(CONTROL)
        if control is None or len(own) == 1:
            continue
        dense = own.get("dense")
        lines += [
            f"\n**{link.words}**\n",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        lines += [row(record, control, dense, link) for record in own.values()]
    return "\n".join(lines) + "\n"


def row(record: Record, control: Record, dense: Record | None, link: Link) -> str:
    """A line of the table."""
    own, cells = communication(record, control), [record["arm"], f"{record['seconds']:.3f}"]
    if record is control:
        cells += ["", "", "", "", ""]
    else:
        of_dense = f"1/{communication(dense, control) / own:.1f}" if dense is not None and own > 0 else ""
        payload = f"{wire_over_payload(record):.3f}" if record["payload"] else ""
        use = f"{8 * max(record['sent'], record['received']) / record['seconds'] / link.rate:.0%}" if link.rate else ""
        cells += [f"{own:.3f}", of_dense if record["arm"] != "dense" else "1", f"{record['sent'] / 1e6:.2f}", payload, use]
    cells.append(f"{record['worker_cpu']:.2f}, {record['shard_cpu']:.2f}")
    return "| " + " | ".join(cells) + " |"


def wire_over_payload(record: Record) -> float:
    """Bytes of host 0's link over what the exchange counts of them.

    That is the worker's with other hosts' shards, and, where it has a shard beside it, that one's with the other workers.
    A worker's bytes are spread over all shards alike.
    """
    workers, shards = record["workers"], record["shards"]
    links = (shards - 1 + workers - 1) / shards if record["colocated"] else 1.0
    return float((record["sent_0"] + record["received_0"]) / (links * record["payload"]))


def order(link: Link) -> tuple[float, ...]:
    """Slow links first, those that are no worse than slow first among them."""
    return (link.delay, link.loss, link.rate or math.inf)


def crossovers(records: Sequence[Record]) -> str:
    """For each peer and arm of ours, the rate above which the peer's step is shorter, between the rates that were measured."""
    lines = ["| peer | arm | is slower than the peer |", "|---|---|---|"]
    steps: dict[str, dict[float, float]] = defaultdict(dict)
    for record in records:
        if not record["delay"] and not record["loss"]:
            steps[record["arm"]][record["rate"] or math.inf] = record["seconds"]
    ours = [arm for arm in steps if arm.startswith("arc")]
    pairs = itertools.product((peer for peer in PEERS if peer in steps), ours)
    lines += [f"| {peer} | {arm} | {crossover(steps[arm], steps[peer])} |" for peer, arm in pairs]
    return "\n".join(lines) + "\n"


def crossover(own: dict[float, float], peer: dict[float, float]) -> str:
    """Where the one's steps become longer than the other's."""
    rates = sorted(set(own) & set(peer))
    slower = [rate for rate in rates if own[rate] > peer[rate]]
    if not slower:
        return "at no rate measured"
    at = rates.index(slower[0])
    if at == 0:
        return "at all rates measured" if len(slower) == len(rates) else f"at {words(slower)}"
    return f"between {words([rates[at - 1]])} and {words([rates[at]])}"


def words(rates: Sequence[float]) -> str:
    """Rates, for people."""
    return ", ".join(Link(None if math.isinf(rate) else rate).words for rate in rates)


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Step time, communication time and bytes by the links' rate, and the link's use over time at the slowest rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plain = [record for record in records if not record["delay"] and not record["loss"] and record["rate"]]
    if not plain:
        return
    controls = {record["rate"]: record for record in plain if record["arm"] == CONTROL}
    figure, ((steps, exposed), (sent, use)) = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for number, arm in enumerate(dict.fromkeys(record["arm"] for record in plain)):
        look: Any = {"color": f"C{number}", "label": arm}
        own = sorted((record for record in plain if record["arm"] == arm), key=lambda record: float(record["rate"]))
        rates = [record["rate"] / 1e6 for record in own]
        steps.loglog(rates, [record["seconds"] for record in own], marker="o", **look)
        if arm == CONTROL:
            continue
        exposed.loglog(rates, [max(1e-3, communication(record, controls[record["rate"]])) for record in own], marker="o", **look)
        sent.loglog(rates, [record["sent"] / 1e6 for record in own], marker="o", **look)
        times, shares = link_use(own[0])
        use.plot(times, shares, linewidth=1, **look)
    labels = "step (s)", "communication not hidden (s)", "MB sent a step by the busiest host"
    for axes, what in zip((steps, exposed, sent), labels, strict=True):
        axes.set(xlabel="rate of each link (Mbit/s)", ylabel=what)
        axes.grid(visible=True, which="both", alpha=0.3)
    slowest = words([min(record["rate"] for record in plain)])
    use.set(xlabel=f"seconds, at {slowest}", ylabel="share of worker 0's link, the busier way", ylim=(0, 1.1), xlim=(0, 4))
    steps.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def link_use(record: Record) -> tuple[list[float], list[float]]:
    """Times and shares of the link between two samples, the busier way."""
    samples = record["samples"]
    times, shares = [], []
    for before, after in itertools.pairwise(samples):
        seconds = after[0] - before[0]
        carried = max(after[1] - before[1], after[2] - before[2])
        times.append(after[0])
        shares.append(8 * carried / seconds / record["rate"])
    return times, shares
