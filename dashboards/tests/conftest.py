"""Where the tools are. `make dashboards-test` puts them there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from material import ROOT

TOOLS = Path(os.environ.get("ARC_DASHBOARD_TOOLS", ROOT / "target/tools/dashboards"))


@pytest.fixture(scope="session")
def prometheus_bin() -> Path:
    """The folder of prometheus and promtool."""
    subprocess.run([sys.executable, ROOT / "dashboards/tools/prometheus.py", TOOLS / "prometheus"], check=True)
    return TOOLS / "prometheus/usr/bin"


@pytest.fixture(scope="session")
def arc_bin() -> Path:
    """The folder of arc-ps and arc-worker."""
    folder = Path(os.environ.get("ARC_BIN", ROOT / "target/debug"))
    missing = [name for name in ("arc-ps", "arc-worker") if not (folder / name).exists()]
    assert not missing, f"{folder} has no {missing}: run `cargo build --locked --workspace --bins`, or set ARC_BIN"
    return folder
