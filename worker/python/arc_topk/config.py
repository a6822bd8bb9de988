"""Settings: what is computed (Config), and where the shards are (Peers)."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._native import ConfigError

# Kept out of the plan's algorithm: how densities are given to single tensors, what each worker decides for itself, and the mode,
# which shards have no part in but to compare it.
_NOT_ALGORITHM = ("densities", "device", "mode")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is computed. Equal on all workers; a difference is refused with its name.

    The defaults train like dense averaging at about a thirtieth of the bytes. ``arc-worker train --help`` explains every
    setting at length; the names are the same.
    """

    #: ``arc``, ``randk``, ``topk`` (for comparison) or ``dense``.
    compressor: str = "arc"
    #: ``ef14``, ``ef21``, ``ef21m`` or ``none``.
    feedback: str = "ef14"
    #: Share of a tensor's rows that travel in each step, in (0, 1].
    density: float = 0.2
    #: Share of the averaged sketch's energy at which no more rows are chosen, in (0, 1]: fewer travel where fewer hold it. 1 always
    #: sends the whole density. ``arc`` alone.
    energy: float = 1.0
    #: Densities of single tensors, by patterns of their names; the first that fits counts.
    densities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    #: Dense updates before compression starts.
    warmup_updates: int = 20
    #: Updates over which the density falls to its value after the warm-up.
    ramp_updates: int = 0
    #: Rank of the sketch that chooses the rows.
    sketch_rank: int = 4
    #: ``rademacher`` or ``gaussian``.
    projection: str = "rademacher"
    #: ``per-tensor`` or ``pooled``.
    selection: str = "per-tensor"
    #: Rows of this many elements instead of the tensor's own; 0 keeps its own.
    block_width: int = 0
    #: Tensors with fewer elements are averaged whole, as are all 1-D tensors.
    dense_below_elements: int = 1024
    #: ``f32``, ``bf16``, ``f16``, ``int8`` or ``int4``: values that workers push.
    wire_up: str = "int4"
    #: The mean that shards return.
    wire_down: str = "int4"
    #: Sketches.
    wire_sketch: str = "int8"
    #: Dense tensors and dense rounds.
    wire_dense: str = "f32"
    #: Everything in the warm-up's dense rounds.
    wire_warmup: str = "int8"
    #: Values that share a scale in int8 and int4.
    quant_block: int = 64
    #: Factor on ef14's residual in each step.
    feedback_decay: float = 1.0
    #: Momentum of ef21m.
    eta: float = 0.1
    #: How ef21 and ef21m start: ``first_gradient`` or ``zeros``.
    init: str = "first_gradient"
    #: Seed of projections.
    seed: int = 0
    #: Gradients that travel together, bytes of f32.
    bucket_bytes: int = 25 << 20
    #: Where this worker compresses: ``cuda``, on the GPU that the tensors are on; ``cpu``, where gradients of a GPU are copied to;
    #: ``auto``, the GPU if it can be used. Workers may differ in it.
    device: str = "auto"
    #: ``arc``: gradients go through the shards. ``auto``, for DistributedDataParallel: both they and the process group's own
    #: all-reduce are timed, and the faster way is taken, again whenever the times of steps change.
    mode: str = "arc"

    def __post_init__(self) -> None:
        if self.mode not in ("arc", "auto"):
            raise ConfigError(f"mode is {self.mode!r}: it must be arc or auto")

    @classmethod
    def of(cls, config: Config | None, settings: Mapping[str, Any]) -> Config:
        """The config that was given, or the one of these settings."""
        if config is not None and settings:
            raise ConfigError("give either a config or single settings, not both")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"settings are {', '.join(known)}"
                raise TypeError(f"there is no setting {name}: {hint}")
        return config or cls(**settings)

    def algorithm(self) -> dict[str, object]:
        """As the native half takes it."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in _NOT_ALGORITHM}

    def density_of(self, name: str) -> float | None:
        """The density of the tensor of this name, if it has one of its own."""
        for pattern, density in self.densities.items():
            if fnmatch.fnmatchcase(name, pattern):
                return float(density)
        return None


def _first(*names: str) -> str | None:
    """The first of these environment variables that is set."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


@dataclasses.dataclass(frozen=True)
class Peers:
    """Where the shards are, and as whom to come.

    What is not given is taken from the environment: ``ARC_SHARD_ADDRESSES``, ``ARC_CERTS`` (or ``ARC_CA``, ``ARC_CERT`` and
    ``ARC_KEY``), ``ARC_JOB``, ``ARC_RANK``, ``ARC_WORKERS``; else from torchrun's ``MASTER_ADDR`` (one shard there, at port
    7400), ``RANK`` and ``WORLD_SIZE``.
    """

    shards: tuple[str, ...]
    ca: str
    cert: str
    key: str
    job: str = "default"
    rank: int | None = None
    world_size: int | None = None
    #: Seconds for which shards are tried that do not answer yet.
    connect_timeout: float = 30.0
    #: Seconds for which the other workers may come.
    join_timeout: float = 600.0
    #: Seconds for which a shard that was lost is dialled.
    reconnect_timeout: float = 300.0
    #: Seconds for which no shard may answer while rounds are open.
    progress_timeout: float = 600.0

    @classmethod
    def find(
        cls,
        shards: str | tuple[str, ...] | list[str] | None = None,
        certs: str | os.PathLike[str] | None = None,
        job: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **timeouts: float,
    ) -> Peers:
        """From what is given and the environment."""
        if shards is None:
            shards = _first("ARC_SHARD_ADDRESSES")
        if shards is None and (master := _first("MASTER_ADDR")) is not None:
            shards = f"{master}:7400"
        if shards is None:
            raise ConfigError(
                "no shards are known: pass shards=['host:7400', ...], or set ARC_SHARD_ADDRESSES, "
                "or start the program with `arc-worker local -- python ...`"
            )
        if isinstance(shards, str):
            shards = tuple(address.strip() for address in shards.split(","))
        ca, cert, key = _certificates(certs)
        asked = _first("ARC_RANK", "RANK") if rank is None else rank
        world = _first("ARC_WORKERS", "WORLD_SIZE") if world_size is None else world_size
        return cls(
            shards=tuple(shards),
            ca=ca,
            cert=cert,
            key=key,
            job=job or _first("ARC_JOB") or "default",
            rank=whole("rank", asked),
            world_size=whole("world_size", world),
            **timeouts,
        )

    def native(self) -> dict[str, object]:
        """As the native half takes it."""
        return {"shards": list(self.shards), "ca": self.ca, "cert": self.cert, "key": self.key}


def whole(name: str, value: int | str | None) -> int | None:
    """The number that this setting is, where it is given."""
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number") from None


def _certificates(certs: str | os.PathLike[str] | None) -> tuple[str, str, str]:
    """Files of the authority, the worker's certificate and its key."""
    given = certs if certs is not None else _first("ARC_CERTS")
    directory = None if given is None else Path(given)
    if directory is not None and (directory / "worker").is_dir():
        directory = directory / "worker"
    files = []
    for variable, name in (("ARC_CA", "ca.pem"), ("ARC_CERT", "cert.pem"), ("ARC_KEY", "key.pem")):
        own = _first(variable)
        if own is not None:
            path = Path(own)
        elif directory is not None:
            path = directory / name
        else:
            raise ConfigError(
                f"no certificates are known ({variable} is not set either): make them with `arc-ps certs --out DIR` and "
                "pass certs=DIR, or set ARC_CERTS"
            )
        if not path.is_file():
            raise ConfigError(f"{path} is not there: pass a directory with ca.pem, cert.pem and key.pem")
        files.append(str(path))
    return files[0], files[1], files[2]
