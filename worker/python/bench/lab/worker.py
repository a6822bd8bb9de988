"""One worker of a job in the lab (links.py starts it on a host of its own).

It trains by one arm, says when it is ready, and then for each line on standard input runs some steps and answers with what they
took. It ends with its input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shapes import SideBySide, shape_of
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

import arc_topk

#: Steps before anything is measured: DDP settles its buckets in the first, PowerSGD compresses from the third on.
WARM_UP = 4
SAMPLED_EVERY = 0.02
#: Steps after which one that chooses its way has noticed a change.
CALM = 8
MOST_TRIED = 200


@dataclasses.dataclass
class Measured:
    """What some steps took, of this worker."""

    steps: int
    #: Median seconds of a step.
    seconds: float
    worst: float
    #: Bytes of its link a step, headers of Ethernet and all above it included.
    sent: float
    received: float
    #: Processor seconds a step.
    cpu: float
    #: Seconds a step in the engine of arc_topk, beside the trainer, and waiting for shards.
    compress: float = 0.0
    wait: float = 0.0
    #: Bytes a step that the exchange counts as its own, both ways.
    payload: float = 0.0
    #: What mode="auto" chose, and why.
    choice: str | None = None
    #: Seconds since the first step began, bytes sent and received until then.
    samples: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)


def carried(device: str = "eth0") -> tuple[int, int]:
    """Bytes that a device has sent and received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    raise SystemExit(f"there is no {device}")


class Sampler:
    """Watches the link while steps are measured."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._begun = time.perf_counter()
        self._base = carried()
        self.samples: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLED_EVERY):
            sent, received = carried()
            self.samples.append((round(time.perf_counter() - self._begun, 4), sent - self._base[0], received - self._base[1]))

    def end(self) -> list[tuple[float, int, int]]:
        """What it saw."""
        self._stop.set()
        self._thread.join()
        return self.samples


# Without annotations, which DDP compares with its own.
def silent(_, bucket):
    """The control: gradients go nowhere."""
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def averaged(model: SideBySide, arm: str) -> tuple[DistributedDataParallel, arc_topk.Exchange | None]:
    """The model, averaged with the others' by an arm; links.py has their names."""
    kind, *more = arm.split("-")
    # PowerSGD's hook over gloo works with one bucket alone.
    net = DistributedDataParallel(model, bucket_cap_mb=2000 if kind == "powersgd" else 25, gradient_as_bucket_view=True)
    if kind == "none":
        net.register_comm_hook(None, silent)
    elif kind == "bf16":
        net.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif kind == "powersgd":
        state = powersgd.PowerSGDState(None, matrix_approximation_rank=int(more[0]), start_powerSGD_iter=2, random_seed=0)
        net.register_comm_hook(state, powersgd.powerSGD_hook)
    elif kind == "shards":
        return net, arc_topk.register(net, compressor="dense")
    elif kind == "arc":
        density, wire = more
        return net, arc_topk.register(net, density=float(density), wire_up=wire, wire_down=wire, warmup_updates=1)
    elif kind == "auto":
        density, wire = more
        settings: dict[str, Any] = {"density": float(density), "wire_up": wire, "wire_down": wire, "mode": "auto"}
        return net, arc_topk.register(net, warmup_updates=1, **settings)
    elif kind != "dense":
        raise SystemExit(f"there is no arm {arm}")
    return net, None


class Worker:
    """A model that trains, step by step."""

    def __init__(self, arm: str, shape: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = SideBySide(*shape_of(shape))
        self.net, self.exchange = averaged(self.model, arm)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        hidden, intermediate, *_ = shape_of(shape)
        torch.manual_seed(1 + dist.get_rank())
        self.inputs = [torch.randn(4, max(hidden, intermediate)) for _ in range(16)]
        self.done = 0

    def step(self) -> float:
        """Trains one step; its seconds."""
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        self.net(self.inputs[self.done % len(self.inputs)]).backward()
        self.optimizer.step()
        self.done += 1
        return time.perf_counter() - begun

    def measure(self, settle: int, most: int, seconds: float) -> Measured:
        """Steps over a link that has just been changed: some to settle, then at most so many as fit into the time, two at least."""
        last = [self.step() for _ in range(settle)][-1]
        # One that chooses its way must notice the change, and choose: all workers do so alike.
        calm, auto = 0, None if self.exchange is None else self.exchange.auto
        for _ in range(MOST_TRIED):
            if auto is None or calm == CALM:
                break
            last = self.step()
            calm = calm + 1 if auto.settled else 0
        wanted = torch.tensor([min(max(2, round(seconds / last)), most)])
        # All must do as many; and no worker is a step ahead when the first begins.
        dist.broadcast(wanted, 0)
        dist.barrier()
        before = dataclasses.replace(self.exchange.summary) if self.exchange is not None else None
        sampler = Sampler()
        sent, received = carried()
        cpu = time.process_time()
        taken = [self.step() for _ in range(int(wanted))]
        steps = len(taken)
        cpu = time.process_time() - cpu
        after = carried()
        measured = Measured(
            steps=steps,
            seconds=statistics.median(taken),
            worst=max(taken),
            sent=(after[0] - sent) / steps,
            received=(after[1] - received) / steps,
            cpu=cpu / steps,
            samples=sampler.end(),
        )
        if before is not None and self.exchange is not None:
            now = self.exchange.summary
            measured.compress = (now.compress_seconds - before.compress_seconds) / steps
            measured.wait = (now.wait_seconds - before.wait_seconds) / steps
            measured.choice = now.choice
            measured.payload = (now.bytes_sent + now.bytes_received - before.bytes_sent - before.bytes_received) / steps
        return measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", required=True)
    parser.add_argument("--shape", required=True)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    worker = Worker(options.arm, options.shape)
    for _ in range(WARM_UP):
        worker.step()
    dist.barrier()
    print(json.dumps({"ready": True, "gradient": worker.model.gradient_bytes}), flush=True)
    for line in sys.stdin:
        measured = worker.measure(**json.loads(line))
        print(json.dumps(dataclasses.asdict(measured)), flush=True)
    dist.barrier()
    arc_topk.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
