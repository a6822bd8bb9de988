"""A real job and a real Prometheus that watches it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from material import HERE, RULES

NAME = "live"
# A model of a few thousand parameters on the built-in text.
SMALL = (
    *("--data=builtin", "--hidden=32", "--intermediate=64", "--layers=1", "--heads=2", "--context=32", "--batch=2", "--threads=1"),
    *("--steps=1000000", "--warmup-updates=5", "--dense-below-elements=64"),
    *("--validate-every=20", "--validate-batches=1", "--digest-every=20", "--snapshot-every=40"),
)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody uses just now."""
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def await_that(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Returns once it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s: {what}"
        time.sleep(0.1)


def fetched(url: str) -> str:
    """The body of an answer; nothing from a server that is not there."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            body: bytes = answer.read()
            return body.decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return ""


class Job:
    """Two shards and some workers, with what is needed to disturb them."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        """Makes certificates and chooses ports."""
        self.binaries, self.folder = binaries, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.admin: dict[str, int] = {}
        self.udp = [free_port(socket.SOCK_DGRAM) for _ in range(2)]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("ARC_")}
        self.certs("--host", "127.0.0.1")

    def certs(self, *arguments: str) -> None:
        """Makes or renews certificates."""
        command = [str(self.binaries / "arc-ps"), "certs", "--out", str(self.folder / "certs"), *arguments]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def start(self, name: str, program: str, *arguments: str) -> None:
        """Starts a process with metrics on a port of its own, the one from before if it had one."""
        port = self.admin.setdefault(name, free_port())
        command = [str(self.binaries / program), *arguments, f"--admin=127.0.0.1:{port}", f"--certs={self.folder / 'certs'}"]
        # However the tests end, it ends with them.
        command.append("--until-stdin-ends")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, env=self.environment, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def shard(self, at: int) -> None:
        """Starts a shard. Its frames take up to 30 ms more, but rounds wait for 20 ms only once two workers have contributed."""
        self.start(
            f"shard-{at}",
            "arc-ps",
            *("--shards=2", f"--shard={at}", f"--listen=127.0.0.1:{self.udp[at]}", f"--snapshot-dir={self.folder}/snapshots-{at}"),
            *("--workers=3", "--max-workers=4", "--quorum=2", "--straggler-timeout-seconds=0.02", "--start-grace-seconds=0"),
            "--chaos-delay-ms=30",
        )

    def worker(self, name: str, *arguments: str) -> None:
        """Starts a worker."""
        addresses = ",".join(f"127.0.0.1:{port}" for port in self.udp)
        self.start(name, "arc-worker", "train", f"--shard-addresses={addresses}", *SMALL, *arguments)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to a process of this job."""
        self.processes[name].send_signal(number)

    def metrics(self, name: str) -> str:
        """What a process serves now."""
        return fetched(f"http://127.0.0.1:{self.admin[name]}/metrics")

    def value(self, name: str, series: str) -> float:
        """A series of a process; 0 if it is not there."""
        lines = (line.rpartition(" ") for line in self.metrics(name).splitlines() if not line.startswith("#"))
        return next((float(value) for found, _, value in lines if found == series), 0.0)

    def await_value(self, name: str, series: str, least: float) -> None:
        """Waits for a series to reach a value."""
        await_that(lambda: self.value(name, series) >= least, f"{name}: {series} >= {least}; see {self.folder}/{name}.log")

    def steps(self, name: str) -> float:
        """Steps that a worker has done."""
        return self.value(name, 'arc_steps_total{outcome="applied"}')

    def await_steps(self, name: str, more: int) -> None:
        """Waits for a worker to do some more steps."""
        self.await_value(name, 'arc_steps_total{outcome="applied"}', self.steps(name) + more)

    def end(self) -> None:
        """Ends all that still run."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()


class Prometheus:
    """A server that scrapes twice a second, with the project's own configuration and rules otherwise."""

    def __init__(self, binaries: Path, folder: Path, targets: list[dict[str, Any]]) -> None:
        """Starts it."""
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((HERE / "prometheus/prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        (folder / "rules.yaml").write_bytes(RULES.read_bytes())
        (folder / "targets").mkdir()
        (folder / "targets/job.yaml").write_text(yaml.safe_dump(targets))
        command = [
            str(binaries / "prometheus"),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        await_that(lambda: fetched(f"{self.url}/-/ready"), f"Prometheus is ready; see {self.log}")

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def over_time(self, expr: str, start: float, end: float) -> list[float]:
        """All values of all series of an expression, each second, but for those that are no numbers."""
        data = self.ask("query_range", query=expr, start=str(start), end=str(end), step="1")
        values = [float(value) for series in data["result"] for _, value in series["values"]]
        return [value for value in values if value == value]

    def end(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def watched(arc: Path, prometheus: Path, folder: Path) -> Iterator[tuple[Job, Prometheus]]:
    """A job that trains, and the Prometheus that watches it."""
    job = Job(arc, folder)
    server = None
    try:
        for at in range(2):
            job.shard(at)
        pools = {"worker-0": "fast", "worker-1": "fast", "worker-2": "slow"}
        for rank, name in enumerate(pools):
            job.worker(name, f"--rank={rank}")
        job.admin["worker-3"] = free_port()
        pools["worker-3"] = "slow"
        server = Prometheus(prometheus, folder, list(targets(job, pools)))
        for name in ("worker-0", "worker-1", "worker-2"):
            job.await_value(name, 'arc_steps_total{outcome="applied"}', 10)
        yield job, server
    finally:
        job.end()
        if server:
            server.end()


def targets(job: Job, pools: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What is to be scraped, with the labels that README.md asks for."""
    for name, port in job.admin.items():
        pool = {"pool": pools[name]} if name in pools else {}
        yield {"targets": [f"127.0.0.1:{port}"], "labels": {"job": NAME, "instance": name} | pool}
