"""A whole job on this machine: shards in this process, workers in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from . import _native, _state


def local(function: Callable[..., Any], *arguments: Any, workers: int = 2, shards: int = 2, job: str = "local") -> list[Any]:
    """Calls ``function(*arguments)`` in as many processes, each a worker of one job; what they returned, by rank.

    Shards, certificates and torchrun's variables (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
    ``MASTER_PORT``) are there for each of them, so that ``torch.distributed`` can be used as well. ``function`` must be one
    that another process can import, as with ``torch.multiprocessing.spawn``. If a worker fails the others are ended, and its
    error is raised. ``arc-worker local -- python train.py`` does the same for a script.
    """
    with tempfile.TemporaryDirectory(prefix="arc-certs-") as directory:
        served = _native.LocalShards(directory, job, shards, workers)
        try:
            return _run(function, arguments, environments(served, job, workers))
        finally:
            served.stop()


def environments(served: _native.LocalShards, job: str, workers: int) -> list[dict[str, str]]:
    """Variables by which the workers of a job on these shards find each other, by rank."""
    common = {
        "ARC_SHARD_ADDRESSES": ",".join(served.addresses),
        "ARC_CERTS": str(served.certs),
        "ARC_JOB": job,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(workers),
        "ARC_WORKERS": str(workers),
    }
    return [common | dict.fromkeys(("RANK", "LOCAL_RANK", "ARC_RANK"), str(rank)) for rank in range(workers)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], given: list[dict[str, str]]) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    started = []
    for rank, environment in enumerate(given):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(theirs, environment, function, arguments), name=f"worker {rank}")
        process.start()
        theirs.close()
        started.append((process, ours))
    results: dict[int, Any] = {}
    waiting: dict[Connection, int] = {ours: rank for rank, (_, ours) in enumerate(started)}
    try:
        while waiting:
            for ready in wait(list(waiting)):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                try:
                    error, result = pickle.loads(ready.recv_bytes())
                except EOFError:
                    started[rank][0].join()
                    code = started[rank][0].exitcode
                    raise _native.ArcError(f"worker {rank} ended without a word (exit code {code})") from None
                if error is not None:
                    raise _native.ArcError(f"worker {rank} failed:\n{error}")
                results[rank] = result
    finally:
        for process, _ in started:
            if waiting:
                process.terminate()
            process.join()
    return [results[rank] for rank in range(len(given))]


def _worker(answer: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    try:
        result = function(*arguments)
        _state.shutdown()
        # By value: tensors would be shared with a process that is about to end.
        answer.send_bytes(pickle.dumps((None, result)))
    except BaseException:  # noqa: BLE001 - raised by the parent
        answer.send_bytes(pickle.dumps((traceback.format_exc(), None)))
    finally:
        _state.shutdown()
