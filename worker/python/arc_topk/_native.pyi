"""The native half: a worker's session on tensors that are given by address."""

from collections.abc import Sequence

__version__: str

class ArcError(RuntimeError):
    """Something failed in arc_topk."""

class ConfigError(ValueError):
    """A setting, or a tensor, is not what it must be."""

class ConnectionFailed(ArcError):
    """The job could not be joined, or the connection with it is lost."""

class JobEnded(ArcError):
    """The shards ended the job, for the reason given."""

class Superseded(ArcError):
    """The job went on without this worker, further than it can follow."""

class Outcome:
    """What came of a step."""

    step: int
    update: int
    skipped: bool
    density: float
    captured_energy: float | None
    bytes_sent: int
    bytes_received: int
    dense_equivalent_bytes: int
    compress_seconds: float
    wait_seconds: float
    rounds: int
    rounds_counted: int

class Session:
    """A worker's place in a job. One step is begin, push for every tensor, finish, results."""

    def __init__(self, options: str) -> None: ...
    def rank(self) -> int: ...
    def members(self) -> list[int]: ...
    def is_leader(self) -> bool: ...
    def run(self) -> str: ...
    def start_step(self) -> int: ...
    def needs_snapshot(self) -> bool: ...
    def donation_due(self) -> bool: ...
    def donating(self, step: int) -> None: ...
    def donation_ended(self, step: int, stored: bool) -> None: ...
    def widths(self) -> list[int]: ...
    def begin(self) -> bool: ...
    def lend(self, tensor: int, owner: object, address: int, elements: int) -> None: ...
    def lend_on_device(self, tensor: int, owner: object, address: int, elements: int, dtype: str, stream: int) -> None: ...
    def abandon(self) -> None: ...
    def finish(self) -> Outcome: ...
    def results(
        self, tensors: Sequence[tuple[int, int, int, str]], factor: float = 1.0, on_device: Sequence[int] = ..., stream: int = 0
    ) -> list[tuple[int, bytes]]: ...
    def rows(self, tensor: int) -> bytes | None: ...
    def export_state(self) -> tuple[int, int, list[tuple[str, bytes]]]: ...
    def import_state(self, step: int, update: int, arrays: Sequence[tuple[str, bytes]]) -> None: ...
    def digest(self, step: int, digest: bytes) -> None: ...
    def report(self, step: int, loss: float, step_seconds: float, wait_seconds: float) -> None: ...
    def leave(self) -> None: ...

def gpu_name(ordinal: int) -> str:
    """Name of a GPU that can be used; raises ConfigError with cause and remedy."""

class Store:
    """The shards' snapshot store, for what all workers have alike."""

    def __init__(self, peers: str) -> None: ...
    def put(self, run: str, step: int, replica: bytes) -> None: ...
    def fetch(self, run: str, step: int) -> bytes: ...

class LocalShards:
    """The shards of one job, on loopback ports of the system's choice, with certificates of their own."""

    def __init__(self, directory: str, job: str, shards: int, workers: int) -> None: ...
    @property
    def addresses(self) -> list[str]: ...
    @property
    def certs(self) -> str: ...
    def stop(self) -> None: ...

# Address and elements.
_Place = tuple[int, int]

def catch_up_adamw(
    tensors: Sequence[tuple[str, int, int, _Place, _Place, _Place, _Place, _Place, _Place, _Place | None]],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rates: Sequence[float],
    cap: int,
    maximize: bool,
    parallel: bool,
) -> None:
    """One step in place: dtype, width, step, parameter, gradient, exp_avg, exp_avg_sq, last, seen and rows of each tensor."""
