"""Real shards, and workers as processes of their own."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import arc_topk

_BIN = Path(os.environ.get("ARC_BIN", Path(__file__).parents[3] / "target" / "debug"))


class Shards:
    """The shards of one job on loopback."""

    def __init__(self, directory: Path, shards: int, workers: int, *more: str) -> None:
        self.certs = directory / "certs"
        program = str(_BIN / "arc-ps")
        subprocess.run([program, "certs", "--out", str(self.certs), "--days", "1"], check=True, capture_output=True)
        self.addresses = []
        # Where they serve status and metrics, if ``more`` says so.
        self.pages: list[str] = []
        self.processes = []
        for shard in range(shards):
            command = [program, "--ready-json", "--listen=127.0.0.1:0", "--start-grace-seconds=0"]
            if not any(word.startswith("--admin") for word in more):
                command.append("--admin=off")
            command += [f"--shard={shard}", f"--shards={shards}", f"--workers={workers}", f"--certs={self.certs}", *more]
            log = (directory / f"shard-{shard}.log").open("w")
            self.processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))
        for process in self.processes:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            self.addresses.append(ready["quic"])
            self.pages.append(f"http://{ready['admin']}/")

    def environment(self) -> dict[str, str]:
        return {"ARC_SHARD_ADDRESSES": ",".join(self.addresses), "ARC_CERTS": str(self.certs)}

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=20)


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Callable[..., Shards]]:
    """Starts shards; they end with the test."""
    started: list[Shards] = []

    def start(shards: int = 2, workers: int = 2, *more: str) -> Shards:
        directory = tmp_path / f"job-{len(started)}"
        directory.mkdir()
        started.append(Shards(directory, shards, workers, *more))
        return started[-1]

    yield start
    for job in started:
        job.stop()


def _serve(tasks: Any, results: Any) -> None:
    """A worker process: one task after the other, each in a job of its own."""
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        rank, environment, function, arguments = task
        os.environ.update(environment)
        arc_topk.init()
        try:
            # By value: tensors in a queue belong to a process that may be gone.
            blob = io.BytesIO()
            torch.save(function(rank, *arguments), blob)
            results.put((rank, None, blob.getvalue()))
        except BaseException:  # noqa: BLE001 - shown by the test
            results.put((rank, traceback.format_exc(), None))
        finally:
            arc_topk.shutdown()


class Workers:
    """Processes that are workers of one job after the other: most of a process's start is importing torch."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.results = self.context.Queue()
        self.processes: list[tuple[Any, Any]] = []

    def run(self, job: Shards, workers: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Runs ``function(rank, *arguments)`` in as many processes; what they returned, by rank."""
        while len(self.processes) < workers:
            tasks = self.context.Queue()
            process = self.context.Process(target=_serve, args=(tasks, self.results), daemon=True)
            process.start()
            self.processes.append((process, tasks))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank, (_, tasks) in enumerate(self.processes[:workers]):
            environment = job.environment() | {
                "RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
            }
            tasks.put((rank, environment, function, arguments))
        got: dict[int, Any] = {}
        for _ in range(workers):
            rank, error, value = self.results.get(timeout=240)
            if error is not None:
                # The others wait for it, and must not answer into the next test.
                self.stop()
                pytest.fail(f"worker {rank}:\n{error}")
            got[rank] = torch.load(io.BytesIO(value), weights_only=True)
        return [got[rank] for rank in range(workers)]

    def stop(self) -> None:
        for process, _ in self.processes:
            process.kill()
            process.join()
        self.processes = []
        self.results = self.context.Queue()


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Worker processes."""
    pool = Workers()
    yield pool
    pool.stop()
