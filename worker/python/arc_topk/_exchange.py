"""A job's gradients, a step at a time: tensors on one side, the native session on the other."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fnmatch
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from . import _gpu, _native
from ._auto import Auto
from ._tensors import dtype_name, is_dense
from .config import Config, Peers

logger = logging.getLogger("arc_topk")

# Steps after which it is known whether compression pays.
_JUDGED_AFTER = 100


@dataclasses.dataclass
class Summary:
    """What a worker sent and got, and where its time went, since it joined."""

    steps: int = 0
    skipped: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_equivalent_bytes: int = 0
    compress_seconds: float = 0.0
    wait_seconds: float = 0.0
    density: float = 1.0
    captured_energy: float | None = None
    #: Steps that the process group averaged (``mode="auto"``). Nothing else here counts them.
    all_reduced: int = 0
    #: What ``mode="auto"`` chose last, and why.
    choice: str | None = None

    def add(self, outcome: _native.Outcome) -> None:
        self.steps += 1
        self.skipped += outcome.skipped
        self.bytes_sent += outcome.bytes_sent
        self.bytes_received += outcome.bytes_received
        self.dense_equivalent_bytes += outcome.dense_equivalent_bytes
        self.compress_seconds += outcome.compress_seconds
        self.wait_seconds += outcome.wait_seconds
        self.density = outcome.density
        self.captured_energy = outcome.captured_energy

    @property
    def compression(self) -> float:
        """How many times fewer bytes than dense training, both ways together (``dense_equivalent_bytes`` are those of one)."""
        return 2 * self.dense_equivalent_bytes / max(1, self.bytes_sent + self.bytes_received)


@dataclasses.dataclass(frozen=True)
class _News:
    """What shard 0 is to be told of a step."""

    step: int
    seconds: float
    wait_seconds: float


class Exchange:
    """Averages the tensors that were registered, a step at a time. Calls may come from any thread."""

    def __init__(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        config: Config,
        peers: Peers,
        *,
        trainer: str = "",
        state: Mapping[str, Any] | None = None,
        elastic: bool = False,
    ) -> None:
        registered = numbered(tensors)
        self.names = [name for name, _ in registered]
        self.index = {id(tensor): at for at, (_, tensor) in enumerate(registered)}
        specs = [
            {
                "name": name,
                # A scalar is a vector of one.
                "shape": list(tensor.shape) or [1],
                "dtype": dtype_name(tensor),
                "density": config.density_of(name),
            }
            for name, tensor in registered
        ]
        for pattern in config.densities:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in self.names):
                logger.warning("densities: no tensor has a name like %r (the first is %r)", pattern, self.names[:1])
        if not specs:
            raise _native.ConfigError("there is no parameter with a gradient: nothing can be averaged")
        self.config = config
        self.peers = peers
        #: The GPU that compresses; ``None``: the CPU does.
        self.gpu = _gpu.chosen([tensor for _, tensor in registered], config)
        # Tensors of the open step that were lent there.
        self._on_gpu: dict[int, torch.Tensor] = {}
        self.summary = Summary()
        #: Whether what is exchanged is the gradients of the tensors.
        self.carries_gradients = True
        #: Called before the state is exported.
        self.before_export: Callable[[], None] = lambda: None
        #: What decides where gradients go, with ``mode="auto"``.
        self.auto: Auto | None = None
        # Whether the last gradients came whole, by other means.
        self._whole = False
        self._lock = threading.Lock()
        self._news: _News | None = None
        self._loss: float | torch.Tensor | None = None
        self._scale = 1.0
        if state is not None:
            check_state(state)
        step, update = (0, 0) if state is None else (state["step"], state["update"])
        #: Updates before the next step: all steps that were not skipped, and all that were averaged by other means.
        self.update: int = update
        options = {
            "peers": peers.native(),
            "job": peers.job,
            "rank": peers.rank,
            "world": peers.world_size,
            "algorithm": config.algorithm(),
            "tensors": specs,
            "trainer": trainer,
            "start_step": step,
            "start_update": update,
            "gpu": None if self.gpu is None else self.gpu.index,
            "when": "any" if elastic else "start",
            "connect_timeout": peers.connect_timeout,
            "join_timeout": peers.join_timeout,
            "reconnect_timeout": peers.reconnect_timeout,
            "progress_timeout": peers.progress_timeout,
        }
        self._options = options
        self._join(options)
        if state is not None and not self.session.needs_snapshot():
            self.load(state)

    def _join(self, options: dict[str, Any]) -> None:
        logger.info("joining job %r at %s", self.peers.job, ", ".join(self.peers.shards))
        self.session = _native.Session(json.dumps(options))
        #: The next step.
        self.step = self.session.start_step()
        self.rank = self.session.rank()
        self.widths = self.session.widths()
        self._ended = time.monotonic()
        logger.info("joined as rank %d of %d", self.rank, self.world_size)

    def join_again(self) -> None:
        """Gives its place up and comes to the job, which runs, as a newcomer. Another worker's state must be loaded next."""
        self.session.leave()
        self._join(self._options | {"rank": None, "when": "running"})

    @property
    def world_size(self) -> int:
        """Workers in the job now."""
        return len(self.session.members())

    def native_peers(self) -> str:
        """Where the shards are, as the native half takes it."""
        return json.dumps(self.peers.native())

    def begin(self, scaler: Any | None = None) -> bool:
        """Opens a step. True: it needs no gradients, since the job has closed it without this worker.

        With a GradScaler, gradients are exchanged without its scale, and results get it back.
        """
        self._tell()
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        self._on_gpu = {}
        return self.session.begin()

    def push(self, index: int, gradient: torch.Tensor) -> None:
        """Hands over a gradient. It is on its way as soon as its bucket is complete.

        One of float32 is not copied: until :meth:`finish` its memory is where the worker computes, and its content of no use to
        others. Feedback state lies there, so that who writes there spoils it if the step is skipped: :meth:`abandon` one that
        breaks off. On the GPU that compresses, none is copied, and nothing of the state lies there.
        """
        # float16 would lose what its scale was for: it is unscaled as float32, in main memory.
        fits = self._scale == 1.0 or gradient.dtype != torch.float16
        if self.gpu is not None and gradient.device == self.gpu and fits:
            self._on_gpu[index] = _gpu.lend(self.session, index, gradient.detach(), self._scale)
            return
        values = gradient.detach().to("cpu", torch.float32)
        if not is_dense(values):
            values = values.contiguous()
        if self._scale != 1.0:
            values.mul_(1.0 / self._scale)
        self.session.lend(index, values, values.data_ptr(), values.numel())

    def abandon(self) -> None:
        """Forgets the open step, if there is one. What was pushed is its owner's again, and feedback state as it was before.

        Only for a step that breaks off before a bucket was complete: shards take no others in the place of gradients that they got.
        """
        with contextlib.suppress(_native.ArcError):
            self.session.abandon()

    def finish(self, results: Iterable[tuple[int, torch.Tensor]]) -> _native.Outcome:
        """Waits for the step, and writes the means to these tensors.

        After a step that all workers skip, because some gradient was not finite, they hold NaN instead, as dense averaging
        would have it: a GradScaler skips the optimizer's step.
        """
        outcome = self.session.finish()
        self._whole = False
        with self._lock:
            self.summary.add(outcome)
            self.step = outcome.step + 1
            self.update = outcome.update + (not outcome.skipped)
            now = time.monotonic()
            self._news = _News(outcome.step, now - self._ended, outcome.wait_seconds)
            self._ended = now
        results = list(results)
        if outcome.skipped:
            for _, tensor in results:
                tensor.fill_(float("nan"))
            return outcome
        staged = []
        targets = []
        for index, tensor in results:
            if index in self._on_gpu:
                continue
            target = tensor
            if tensor.device.type != "cpu" or not is_dense(tensor):
                # Its elements lie as those that were pushed did.
                target = (
                    torch.empty_like(tensor, device="cpu") if is_dense(tensor) else torch.empty(tensor.shape, dtype=tensor.dtype)
                )
                staged.append((tensor, target))
            targets.append((index, target.data_ptr(), target.numel(), dtype_name(target)))
        if self.gpu is None:
            self.session.results(targets, self._scale)
        else:
            _gpu.take(self.session, targets, self._scale, self.gpu, results, self._on_gpu)
        for tensor, target in staged:
            tensor.copy_(target)
        self._judge()
        return outcome

    def passed(self) -> None:
        """The gradients of an update are averaged by other means, on all workers alike, instead of in a step."""
        self.session.pass_update()
        self._whole = True
        with self._lock:
            self.summary.all_reduced += 1
            self.update += 1
            # The next step's time is its own.
            self._ended = time.monotonic()

    def fresh_rows(self, index: int) -> torch.Tensor | None:
        """Rows of the last result that came, ascending; ``None`` for all of them."""
        return None if self._whole else to_rows(self.session.rows(index))

    def state_dict(self) -> dict[str, Any]:
        """Step and feedback state of this rank, for ``state=`` of the next start."""
        self.before_export()
        step, update, arrays = self.session.export_state()
        tensors = {name: to_tensor(values) for name, values in arrays}
        return {"step": step, "update": update, "arrays": tensors}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave. Before the first step only."""
        check_state(state)
        arrays = [(name, to_bytes(values)) for name, values in state["arrays"].items()]
        self.session.import_state(state["step"], state["update"], arrays)

    def report(self, loss: float | torch.Tensor) -> None:
        """Says this worker's training loss, once a step and after ``backward()``, for the shards' status page and metrics."""
        with self._lock:
            self._loss = loss.detach() if isinstance(loss, torch.Tensor) else loss
        self._tell()

    def _tell(self) -> None:
        """Tells shard 0 of the step that ended last, if it has not been told."""
        with self._lock:
            news, self._news = self._news, None
            if news is None:
                # The loss came early, before the step has ended.
                return
            loss, self._loss = self._loss, None
        # Nobody has to say it: shards leave losses that are no numbers out.
        known = float("nan") if loss is None else float(loss)
        with contextlib.suppress(_native.ArcError):
            self.session.report(news.step, known, news.seconds, news.wait_seconds)

    def leave(self) -> None:
        """Leaves the job in order."""
        self._tell()
        self.session.leave()

    def _judge(self) -> None:
        summary = self.summary
        compresses = self.config.compressor != "dense"
        if summary.steps != self.config.warmup_updates + _JUDGED_AFTER or not compresses:
            return
        if summary.compression < 1.0:
            logger.warning(
                "compression does not pay: %.0f %% of the bytes of dense training were moved; most tensors are averaged "
                "whole, because they are small or one-dimensional (dense_below_elements=%d)",
                100.0 / max(summary.compression, 1e-9),
                self.config.dense_below_elements,
            )
        elif summary.compress_seconds > 2.0 * summary.wait_seconds:
            logger.warning(
                "compression may not pay on this network: %.2f s went to compressing and %.2f s to waiting for the shards; "
                "try compressor='dense' beside it",
                summary.compress_seconds,
                summary.wait_seconds,
            )


def numbered(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Each tensor once, under the first of its names, in the order in which it takes its number."""
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        once.setdefault(id(tensor), (name, tensor))
    return list(once.values())


def to_rows(rows: bytes | None) -> torch.Tensor | None:
    """Numbers of rows as the native half gives them."""
    if rows is None:
        return None
    return torch.frombuffer(bytearray(rows), dtype=torch.int32).to(torch.int64) if rows else torch.empty(0, dtype=torch.int64)


def check_state(state: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is no feedback state."""
    missing = [name for name in ("step", "update", "arrays") if name not in state]
    if missing:
        raise _native.ConfigError(
            f"this is no feedback state of arc_topk (it has no {', '.join(missing)}): pass what exchange.state_dict() gave"
        )
    if state.get("follower"):
        raise _native.ConfigError(
            "this is the state of a process that followed another one of its machine (local_group), which has the feedback: pass "
            "what arc_topk.merge_states makes of the states of all processes"
        )


def to_bytes(values: torch.Tensor) -> bytes:
    """Little-endian f32, as the native half takes it."""
    values = values.detach().to("cpu", torch.float32).contiguous()
    return ctypes.string_at(values.data_ptr(), values.numel() * 4) if values.numel() else b""


def to_tensor(values: bytes) -> torch.Tensor:
    """What the native half gives as little-endian f32."""
    if not values:
        return torch.empty(0)
    return torch.frombuffer(bytearray(values), dtype=torch.float32)
