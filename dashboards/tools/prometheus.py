#!/usr/bin/env python3
"""Unpacks Prometheus and promtool, as Debian publishes them, into a directory; nothing is installed.

    python3 dashboards/tools/prometheus.py [DIRECTORY]

`apt-get` fetches the package from whatever mirror this machine is set up with, in whatever revision Debian publishes it today
(security updates replace each other in the archive), and checks it against the archive's signed lists. What is there already is
kept. Exit status: 0 if both programs are there, 1 if they could not be had.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "2.42.0"
DEFAULT = Path(__file__).resolve().parents[2] / "target/tools/dashboards/prometheus"


def download(work: Path) -> Path:
    """The package's file. A machine on which apt has no lists yet is given them, which takes its administrator."""
    command = ["apt-get", "download", f"prometheus={VERSION}*"]
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
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg", "-x", file, target], check=True)
    mark.touch()


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"prometheus {VERSION} cannot be had: {error}; on Debian 12 run `apt-get update` first")
