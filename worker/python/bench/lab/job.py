"""A job in the lab: a shard and a worker on each host, or hosts of their own for shards."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .network import LabError, Link, Network

BENCH = Path(__file__).resolve().parents[1]
QUIC_PORT, GLOO_PORT = 7400, 29500
#: Clock ticks of the kernel's accounts of processes.
TICKS = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is alike for all links and arms of a part of the grid."""

    shape: str
    workers: int
    shards: int
    #: Shards on the workers' hosts, whose links they share, or on hosts of their own.
    colocated: bool = True

    @property
    def hosts(self) -> int:
        """Hosts that it takes."""
        return max(self.workers, self.shards) if self.colocated else self.workers + self.shards

    def host_of_shard(self, shard: int) -> int:
        """Where a shard runs."""
        return shard if self.colocated else self.workers + shard

    @property
    def words(self) -> str:
        """For tables."""
        where = "on the workers' hosts" if self.colocated else "on hosts of their own"
        name, _, layers = self.shape.upper().partition("-")
        shapes = f"LLaMA-{name} shapes" + (f" with {layers} layers" if layers else "")
        return f"{shapes}, {self.workers} workers, {self.shards} shards {where}"


class Job:
    """Processes that train by one arm. Use it as a context."""

    def __init__(self, network: Network, setting: Setting, arm: str, programs: Path, logs: Path) -> None:
        self._network, self._setting, self._arm = network, setting, arm
        self._programs, self._logs = programs, logs
        self._certs = tempfile.TemporaryDirectory(prefix="arc-links-")
        self._shards: list[subprocess.Popen[str]] = []
        self._workers: list[subprocess.Popen[str]] = []
        self.gradient_bytes = 0

    def __enter__(self) -> Job:
        try:
            if self._arm.split("-")[0] in ("arc", "auto", "shards"):
                self._start_shards()
            self._start_workers()
            self.gradient_bytes = self._answers()[0]["gradient"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._workers:
            if process.stdin is not None:
                process.stdin.close()
        for process in (*self._workers, *self._shards):
            if process in self._shards:
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._certs.cleanup()

    def measure(self, link: Link, settle: int, steps: int, seconds: float) -> dict[str, Any]:
        """Shapes the links and lets all workers train some steps; worker 0's figures, and the processor's of all."""
        self._network.shape(link)
        shards = self._shard_seconds()
        for process in self._workers:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"settle": settle, "most": steps, "seconds": seconds}) + "\n")
            process.stdin.flush()
        answers = self._answers()
        measured = answers[0] | {"sent_0": answers[0]["sent"], "received_0": answers[0]["received"]}
        # The shards' account is of the steps before, too.
        measured["shard_cpu"] = (self._shard_seconds() - shards) / (settle + measured["steps"])
        measured["worker_cpu"] = sum(answer["cpu"] for answer in answers)
        measured["sent"] = max(answer["sent"] for answer in answers)
        measured["received"] = max(answer["received"] for answer in answers)
        return measured

    def _start_shards(self) -> None:
        setting = self._setting
        addresses = [Network.address(setting.host_of_shard(shard)) for shard in range(setting.shards)]
        hosts = [word for address in addresses for word in ("--host", address)]
        made = [str(self._programs / "arc-ps"), "certs", "--out", self._certs.name, "--days", "30", *hosts]
        subprocess.run(made, check=True, capture_output=True)
        for shard, address in enumerate(addresses):
            command = [str(self._programs / "arc-ps"), f"--listen={address}:{QUIC_PORT}", f"--certs={self._certs.name}"]
            command += ["--admin=off"]
            command += [f"--shard={shard}", f"--shards={setting.shards}", f"--workers={setting.workers}", "--start-grace-seconds=0"]
            log = (self._logs / f"{self._arm}-shard-{shard}.log").open("w")
            self._shards.append(self._network.popen(setting.host_of_shard(shard), command, stdout=log, stderr=log, env=clean()))
        self._addresses = ",".join(f"{address}:{QUIC_PORT}" for address in addresses)

    def _start_workers(self) -> None:
        setting = self._setting
        common = {"MASTER_ADDR": Network.address(0), "MASTER_PORT": str(GLOO_PORT), "GLOO_SOCKET_IFNAME": "eth0"}
        paths = os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])
        common |= {"WORLD_SIZE": str(setting.workers), "ARC_CERTS": self._certs.name, "PYTHONPATH": paths}
        if self._shards:
            common |= {"ARC_SHARD_ADDRESSES": self._addresses}
        command = [sys.executable, "-m", "lab.worker", f"--arm={self._arm}", f"--shape={setting.shape}"]
        for rank in range(setting.workers):
            log = (self._logs / f"{self._arm}-worker-{rank}.log").open("w")
            environment = clean() | common | {"RANK": str(rank), "LOCAL_RANK": "0"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self._workers.append(self._network.popen(rank, command, env=environment, **pipes))

    def _answers(self) -> list[dict[str, Any]]:
        """A line of each worker."""
        answers = []
        for rank, process in enumerate(self._workers):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                log = self._logs / f"{self._arm}-worker-{rank}.log"
                end = "\n".join(log.read_text().splitlines()[-8:])
                raise LabError(f"{self._arm}: worker {rank} has ended; its log, {log}, ends with\n{end}")
            answers.append(json.loads(line))
        return answers

    def _shard_seconds(self) -> float:
        """Processor time of all shards until now."""
        return sum(processor_seconds(process.pid) for process in self._shards)


def processor_seconds(pid: int) -> float:
    """Processor time of a process, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def clean() -> dict[str, str]:
    """This process's environment without settings of jobs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ARC_")}


def machine() -> Iterator[str]:
    """What it was measured on, for whoever reads the table."""
    told = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in told if line.startswith("model name")), "")
    yield f"{os.cpu_count()} cores ({model}), Linux {os.uname().release}"
    yield time.strftime("%Y-%m-%d")
