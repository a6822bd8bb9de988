"""Real shards, and workers as processes of their own."""

from __future__ import annotations

import faulthandler
import io
import json
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import tempfile
import time
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


#: Seconds that a task of a few seconds gets; some compile, and the machine may be busy.
_PATIENCE = 240.0


def _serve(tasks: Any, results: Any, stacks: str) -> None:
    """A worker process: one task after the other, each in a job of its own. SIGUSR1 writes where it is into ``stacks``."""
    # For the process's life, under its name once the signal is known: until then it would end the process.
    place = open(f"{stacks}.new", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=place, all_threads=True)
    Path(place.name).rename(stacks)
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
        # Process, its tasks, and where it says what it is doing.
        self.processes: list[tuple[Any, Any, Path]] = []
        self.stacks = tempfile.TemporaryDirectory(prefix="arc-topk-stacks-")

    def run(self, job: Shards, workers: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Runs ``function(rank, *arguments)`` in as many processes; what they returned, by rank."""
        while len(self.processes) < workers:
            tasks, stacks = self.context.Queue(), Path(self.stacks.name) / f"worker-{len(self.processes)}"
            process = self.context.Process(target=_serve, args=(tasks, self.results, str(stacks)), daemon=True)
            process.start()
            self.processes.append((process, tasks, stacks))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank, (_, tasks, _) in enumerate(self.processes[:workers]):
            environment = job.environment() | {
                "RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
            }
            tasks.put((rank, environment, function, arguments))
        got: dict[int, Any] = {}
        deadline = time.monotonic() + _PATIENCE
        while len(got) < workers:
            rank, error, value = self._next(workers, deadline)
            if error is not None:
                # The others wait for it, and must not answer into the next test.
                self.stop()
                pytest.fail(f"worker {rank}:\n{error}")
            got[rank] = torch.load(io.BytesIO(value), weights_only=True)
        return [got[rank] for rank in range(workers)]

    def _next(self, workers: int, deadline: float) -> tuple[int, str | None, bytes]:
        """The next answer, or as an error how a worker died, or where all are when it takes too long."""
        while True:
            # Before the queue is looked into: what the dead had answered is in it by then.
            dead = [(rank, process) for rank, (process, _, _) in enumerate(self.processes[:workers]) if not process.is_alive()]
            try:
                answer: tuple[int, str | None, bytes] = self.results.get(timeout=1)
            except queue.Empty:
                for rank, process in dead:
                    return rank, f"its process ended with exit code {process.exitcode}", b""
                if time.monotonic() > deadline:
                    return 0, f"no answer in {_PATIENCE:.0f} s; where the workers are:\n{self._where(workers)}", b""
            else:
                return answer

    def _where(self, workers: int) -> str:
        """The stacks of the workers' threads."""
        ready = [(process, stacks) for process, _, stacks in self.processes[:workers] if stacks.exists()]
        for process, _ in ready:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        told = [f"{stacks.name}:\n{stacks.read_text()}" for _, stacks in ready]
        return "\n".join([*told, f"{workers - len(ready)} have not even begun"])

    def stop(self) -> None:
        for process, _, _ in self.processes:
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
