#!/usr/bin/env python3
"""Unpacks Prometheus and promtool, as Debian publishes them, into a directory; nothing is installed.

    python3 dashboards/tools/prometheus.py [DIRECTORY]

`apt-get` fetches the package from whatever mirror this machine is set up with; on amd64 its SHA-256 is checked. What is there
already is kept. Exit status: 0 if both programs are there, 1 if they could not be had.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "2.42.0+ds-5+b6"
SHA256 = {"amd64": "3b0e0255b059a7696bd4a139a4a4eb24d71df067936a61ece5093559cbc7991c"}
DEFAULT = Path(__file__).resolve().parents[2] / "target/tools/dashboards/prometheus"


def download(work: Path) -> Path:
    """The package's file. A machine on which apt has no lists yet is given them, which takes its administrator."""
    command = ["apt-get", "download", f"prometheus={VERSION}"]
    if subprocess.run(command, cwd=work, capture_output=True, check=False).returncode != 0:
        subprocess.run(["apt-get", "update", "--quiet"], cwd=work, stdout=subprocess.DEVNULL, check=True)
        subprocess.run(command, cwd=work, stdout=subprocess.DEVNULL, check=True)
    (file,) = work.glob("prometheus_*.deb")
    return file


def main() -> None:
    """Fetches, checks, unpacks."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    mark = target / VERSION
    if mark.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = download(Path(scratch))
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        wanted = SHA256.get(file.stem.rsplit("_", 1)[-1])
        if wanted not in (None, found):
            sys.exit(f"{file.name} has SHA-256 {found}, expected {wanted}: the mirror served something else")
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg", "-x", file, target], check=True)
    mark.touch()


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"prometheus {VERSION} cannot be had: {error}; on Debian 12 run `apt-get update` first")
