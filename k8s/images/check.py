#!/usr/bin/env python3
"""Builds the images without a daemon or a base image, and trains with them while a shard's container is killed.

    python3 k8s/images/check.py                 builds static binaries (ten minutes), images, and runs a cluster
    python3 k8s/images/check.py --tested        takes the programs that tests use, on an image of their libraries (a minute)
    python3 k8s/images/check.py --keep-images   leaves the images in target/containers

Two shards and three workers run as containers: read-only, without capabilities, as a user that is not root. Once they train, one
shard's container is killed and started again; training must go on, no comparison of the workers' parameters may find them
different, and all must end in order. Needs root, and buildah, podman and runc (Debian: apt install buildah podman runc). What it
keeps is in target alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = REPOSITORY / "target" / "image"
#: The engine's configuration, images and containers. Not in IMAGE, which is a part of the build's context.
ENGINE = REPOSITORY / "target" / "containers"
PROGRAMS = ("arc-ps", "arc-worker")
PACKAGES = ("arc-topk-ps", "arc-topk-worker")
TAG = "check"
LIBRARIES = f"localhost/arc-topk/libraries:{TAG}"
#: The user of the images.
USER = 65532
#: Exit status of a worker that left in order because of a signal.
STOPPED = 130
#: A model of a few thousand parameters on the built-in text; steps until it is told to stop.
TRAINING = (
    *("--data=builtin", "--hidden=32", "--intermediate=64", "--layers=1", "--heads=2", "--context=32", "--batch=2", "--threads=1"),
    *("--steps=1000000", "--warmup-updates=5", "--dense-below-elements=64", "--digest-every=10"),
)
# No cgroups or systemd are asked for, and nothing of the machine's own engine is touched.
CONTAINERS = """[containers]
default_ulimits = ["nofile=20000:20000", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
STORAGE = """[storage]
driver = "vfs"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""


class Failed(Exception):
    """What went wrong, in words for whoever runs this."""


def run(*command: str, quiet: bool = False) -> str:
    """Runs a command in the repository; its standard output."""
    if not quiet:
        print("+", " ".join(command), flush=True)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command[:3])}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def tested() -> str:
    """Takes the programs that tests use, which are not static; an image of the libraries that they are linked to."""
    run("cargo", "test", "--quiet", "--locked", "--workspace", "--no-run", "--test", "it")
    libraries: set[str] = set()
    for program, package in zip(PROGRAMS, PACKAGES, strict=True):
        binary = Path(os.environ.get("CARGO_TARGET_DIR") or REPOSITORY / "target") / "debug" / program
        keep(binary, package)
        libraries |= linked_to(binary)
    return image_of(libraries)


def linked_to(program: Path) -> set[str]:
    """Shared libraries of a program, the loader among them."""
    return {word for word in run("ldd", str(program), quiet=True).split() if word.startswith("/")}


def image_of(files: set[str]) -> str:
    """An image of these files at their places."""
    with tempfile.TemporaryDirectory(prefix="arc-images-") as folder:
        for file in files:
            place = Path(folder, file[1:])
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
        (Path(folder) / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
        run("buildah", "build", "--quiet", "--tag", LIBRARIES, folder, quiet=True)
    return LIBRARIES


def keep(binary: Path, package: str) -> None:
    """Puts a program where the Dockerfiles look for it, with its bill of materials."""
    IMAGE.mkdir(parents=True, exist_ok=True)
    shutil.copy2(binary, IMAGE / binary.name)
    (IMAGE / f"{binary.name}.cdx.json").write_text(run(sys.executable, "k8s/images/sbom.py", package, quiet=True) + "\n")


def binaries(profile: str) -> str:
    """Static programs, the same bytes wherever they are built. They need nothing beside them."""
    told = run("rustc", "-vV", quiet=True)
    host = next(line.removeprefix("host: ") for line in told.splitlines() if line.startswith("host: "))
    crates = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    remapped = f"--remap-path-prefix={REPOSITORY}=. --remap-path-prefix={crates}=cargo"
    os.environ["RUSTFLAGS"] = f"-C target-feature=+crt-static -C strip=symbols {remapped}"
    packages = [word for package in PACKAGES for word in ("-p", package)]
    run("cargo", "build", "--quiet", "--locked", "--profile", profile, "--target", host, "--bins", *packages)
    folder = REPOSITORY / "target" / host / ("debug" if profile == "dev" else profile)
    for program, package in zip(PROGRAMS, PACKAGES, strict=True):
        if str(crates).encode() in (folder / program).read_bytes():
            raise Failed(f"{program} holds paths of this machine, so that it is another one elsewhere")
        keep(folder / program, package)
    return "scratch"


def images(base: str) -> None:
    """Both images, from nothing but those files."""
    for program in PROGRAMS:
        file = f"k8s/images/{program}.Dockerfile"
        tag = f"arc-topk/{program}:{TAG}"
        on = ("--build-arg", f"BASE={base}")
        where = ("--file", file, "--ignorefile", f"{file}.dockerignore", "--target", "prebuilt")
        run("buildah", "build", *where, *on, "--tag", tag, ".")
        size = int(run("podman", "image", "inspect", "--format", "{{.Size}}", tag, quiet=True))
        print(f"{tag}: {size / 1e6:.1f} MB")


def free_port(kind: socket.SocketKind) -> int:
    """A port of loopback that nobody uses just now."""
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Cluster:
    """Containers on this machine's loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.admin: dict[str, int] = {}
        self.udp = [free_port(socket.SOCK_DGRAM) for _ in range(2)]
        run(str(IMAGE / "arc-ps"), "certs", "--out", str(folder / "certs"), "--host", "127.0.0.1", "--days", "1", quiet=True)
        for path in (folder, folder / "certs", *(folder / "certs").rglob("*")):
            os.chown(path, USER, USER)

    def start(self, name: str, program: str, *arguments: str) -> None:
        """Starts a container, as the chart does: read-only, unprivileged."""
        port = self.admin[name] = free_port(socket.SOCK_STREAM)
        run(
            *("podman", "run", "--detach", "--name", name, "--network=host", "--read-only", "--cap-drop=all"),
            *("--security-opt=no-new-privileges", f"--volume={self.folder / 'certs'}:/certs:ro", f"arc-topk/{program}:{TAG}"),
            *(*arguments, "--certs=/certs", f"--admin=127.0.0.1:{port}"),
            quiet=True,
        )

    def shard(self, at: int) -> None:
        """Starts a shard."""
        own = (f"--shard={at}", "--shards=2", "--workers=3", f"--listen=127.0.0.1:{self.udp[at]}", "--start-grace-seconds=0")
        self.start(f"arc-check-ps-{at}", "arc-ps", *own)

    def worker(self, rank: int) -> None:
        """Starts a worker."""
        addresses = ",".join(f"127.0.0.1:{port}" for port in self.udp)
        self.start(f"arc-check-worker-{rank}", "arc-worker", "train", f"--shard-addresses={addresses}", f"--rank={rank}", *TRAINING)

    def value(self, name: str, series: str) -> float:
        """A series of a container's metrics; 0 if it is not there."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin[name]}/metrics", timeout=10) as answer:
                lines = (line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#"))
                return next((float(value) for found, _, value in lines if found == series), 0.0)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return 0.0

    def steps(self, name: str) -> int:
        """Steps that a worker has applied."""
        return int(self.value(name, 'arc_steps_total{outcome="applied"}'))

    def compared(self) -> int:
        """The last step at which shard 0 compared all workers' parameters."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin['arc-check-ps-0']}/status", timeout=10) as answer:
            return int(json.load(answer)["digests_compared"] or 0)

    def await_that(self, condition: Callable[[], bool], what: str) -> None:
        """Returns once it holds."""
        deadline = time.monotonic() + 60
        while not condition():
            for name in self.admin:
                if run("podman", "inspect", "--format", "{{.State.Status}}", name, quiet=True) != "running":
                    raise Failed(f"{name} has ended\n{self.log(name)}")
            if time.monotonic() > deadline:
                raise Failed(f"still not so after a minute: {what}\n" + "\n".join(map(self.log, self.admin)))
            time.sleep(0.2)

    def log(self, name: str) -> str:
        """The end of a container's log."""
        told = subprocess.run(["podman", "logs", "--tail", "20", name], capture_output=True, text=True, check=False)
        return f"== {name}\n{told.stdout}{told.stderr}"


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A running job; its containers are gone in the end."""
    with tempfile.TemporaryDirectory(prefix="arc-images-") as folder:
        made = Cluster(Path(folder))
        try:
            for at in range(2):
                made.shard(at)
            for rank in range(3):
                made.worker(rank)
            yield made
        finally:
            for name in made.admin:
                subprocess.run(["podman", "rm", "--force", "--time", "0", name], capture_output=True, check=False)


def train_through_a_kill() -> None:
    """The job goes on though a shard's container is killed, and ends in order."""
    with cluster() as job:
        workers = [name for name in job.admin if "worker" in name]
        job.await_that(lambda: all(job.steps(name) >= 30 for name in workers), "all workers have done 30 steps")
        run("podman", "kill", "--signal=KILL", "arc-check-ps-1")
        time.sleep(1)
        seen = {name: job.steps(name) for name in workers}
        run("podman", "start", "arc-check-ps-1")
        job.await_that(lambda: all(job.steps(name) >= seen[name] + 30 for name in workers), "all have done 30 steps more")
        job.await_that(lambda: job.compared() > max(seen.values()), "parameters were compared since the kill")
        different = int(job.value("arc-check-ps-0", "arc_digest_mismatches_total"))
        if different:
            raise Failed(f"{different} comparisons of the workers' parameters found them different")
        print(f"steps before the kill {list(seen.values())}, after it {[job.steps(name) for name in workers]}")
        subprocess.run(["podman", "kill", "--signal=TERM", *workers], capture_output=True, check=True)
        for name in workers:
            status = run("podman", "wait", name, quiet=True)
            if int(status) != STOPPED:
                raise Failed(f"{name} ended with exit status {status}\n{job.log(name)}")
        run("podman", "stop", "arc-check-ps-0", "arc-check-ps-1", quiet=True)
        for at in range(2):
            status = run("podman", "inspect", "--format", "{{.State.ExitCode}}", f"arc-check-ps-{at}", quiet=True)
            if status != "0":
                raise Failed(f"shard {at} ended with exit status {status}\n{job.log(f'arc-check-ps-{at}')}")
    print("images: a job of containers trained on though a shard was killed, and ended in order")


def refuse(allowed: bool, reason: str) -> int:
    """Says why nothing is tested; the exit status."""
    print(f"images: {'NOT TESTED: ' if allowed else ''}{reason}", file=sys.stderr)
    return 0 if allowed else 1


def why_not() -> str | None:
    """What keeps containers from running here."""
    if os.geteuid() != 0:
        return "the containers' engine is run as root here: sudo make images-test"
    missing = [program for program in ("buildah", "podman", "runc") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt install buildah podman runc"
    return None


def why_not_run() -> str | None:
    """Why the engine runs not even a program alone, if that is so."""
    shell = Path("/bin/sh").resolve()
    try:
        image = image_of({str(shell), *linked_to(shell)})
        as_later = ("--network=host", "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", f"--user={USER}:{USER}")
        run("podman", "run", "--rm", *as_later, "--volume=/tmp:/certs:ro", image, str(shell), "-c", "true", quiet=True)
    except Failed as what:
        return str(what)
    return None


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="release", help="of the binaries: release, or dev, which is sooner there")
    parser.add_argument("--tested", action="store_true", help="take the programs that tests use, instead")
    parser.add_argument("--where-possible", action="store_true", help="elsewhere say why not, and that nothing was tested")
    parser.add_argument("--keep-images", action="store_true", help="leave the images in target/containers")
    options = parser.parse_args()
    if reason := why_not():
        return refuse(options.where_possible, reason)
    ENGINE.mkdir(parents=True, exist_ok=True)
    for name, text, variable in (
        ("containers.conf", CONTAINERS, "CONTAINERS_CONF"),
        ("storage.conf", STORAGE.format(folder=ENGINE), "CONTAINERS_STORAGE_CONF"),
    ):
        (ENGINE / name).write_text(text)
        os.environ[variable] = str(ENGINE / name)
    try:
        if reason := why_not_run():
            return refuse(options.where_possible, reason)
        base = tested() if options.tested else binaries(options.profile)
        images(base)
        train_through_a_kill()
    except Failed as what:
        print(f"images: {what}", file=sys.stderr)
        return 1
    finally:
        if not options.keep_images:
            subprocess.run(["podman", "rmi", "--all", "--force"], capture_output=True, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
