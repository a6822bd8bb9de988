#!/usr/bin/env python3
"""Photographs every dashboard with the data of a real job: `make screenshots`.

Two shards and three workers train, and are disturbed as in tests/test_live.py, while a real Prometheus watches them. Each panel's
queries are then asked of it, and what they answer is drawn by Grafana's own components (Grafana's server is not needed) and
photographed by a headless Chromium, into dashboards/screenshots/*.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import job
import material
from test_live import VARIABLES, disturb

HERE = Path(__file__).resolve().parent
NAMES = ("training", "communication", "shards", "workers")
#: Data points along a panel.
POINTS = 240
PAGE = """<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="{styles}">
<style>body {{ margin: 0 }}</style><div id="root"></div>
<script>window.shown = {shown}</script><script src="{script}"></script>"""


def bundle(folder: Path) -> Path:
    """The page's script, with all that it needs."""
    script = folder / "page.js"
    command = [str(HERE / "node_modules/.bin/esbuild"), "page.tsx", "--bundle", f"--outfile={script}", "--jsx=automatic"]
    command += ["--define:process.env.NODE_ENV='production'", "--loader:.svg=text", "--loader:.ttf=empty", "--log-level=error"]
    subprocess.run(command, cwd=HERE, check=True)
    return script


def answered(prometheus: job.Prometheus, target: dict[str, Any], start: float, end: float) -> list[dict[str, Any]]:
    """A line for each series of a query's answer, named as the panel names it."""
    expr = material.filled_in(target["expr"], VARIABLES)
    step = (end - start) / POINTS
    found = prometheus.ask("query_range", query=expr, start=str(start), end=str(end), step=str(step))["result"]
    lines = []
    for series in found:
        labels = series["metric"]
        # The odd parts are names of labels.
        parts = re.split(r"{{\s*(\w+)\s*}}", target["legendFormat"])
        name = "".join(labels.get(part, "") if at % 2 else part for at, part in enumerate(parts))
        times = [1000 * float(at) for at, _ in series["values"]]
        numbers = [float(value) for _, value in series["values"]]
        values = [value if abs(value) != float("inf") and value == value else None for value in numbers]
        lines.append({"name": " ".join(name.split()), "times": times, "values": values})
    return lines


def filled(prometheus: job.Prometheus, name: str, start: float, end: float) -> dict[str, Any]:
    """A dashboard's panels with their data."""
    shown = []
    for panel in material.dashboard(name)["panels"]:
        targets = panel.get("targets", [])
        lines = [line for target in targets for line in answered(prometheus, target, start, end)]
        shown.append({**panel, "lines": lines})
    return {"from": 1000 * start, "to": 1000 * end, "panels": shown}


def photograph(browser: str, page: Path, to: Path, height: int) -> None:
    """Draws a page and keeps its picture."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size=1600,{height}", f"--screenshot={to}", page.as_uri()]
    to.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    if not to.exists():
        sys.exit(f"{browser} made no picture of {page.name}:\n{done.stderr}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="that the job trains before it is disturbed (default: 60)")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("a headless browser is needed: apt install chromium")
    tools, binaries = Path(os.environ["ARC_DASHBOARD_TOOLS"]), Path(os.environ["ARC_BIN"])
    with tempfile.TemporaryDirectory(prefix="arc-screenshots-") as scratch:
        folder = Path(scratch)
        script = bundle(folder)
        (folder / "job").mkdir()
        start = time.time()
        with job.watched(binaries, tools / "prometheus/usr/bin", folder / "job") as (running, prometheus):
            print(f"screenshots: a job trains for {options.seconds:.0f} s, then it is disturbed", flush=True)
            time.sleep(options.seconds)
            disturb(running)
            time.sleep(15)
            show = functools.partial(filled, prometheus, start=start, end=time.time())
            dashboards = {name: show(name) for name in NAMES}
        for name, shown in dashboards.items():
            page = folder / f"{name}.html"
            page.write_text(
                PAGE.format(
                    shown=json.dumps(shown).replace("</", "<\\/"),
                    script=script.as_uri(),
                    styles=script.with_suffix(".css").as_uri(),
                )
            )
            places = [panel["gridPos"] for panel in shown["panels"]]
            height = max(place["y"] + place["h"] for place in places) * 38 + 8
            photograph(browser, page, HERE / f"{name}.png", height)
            print(f"screenshots: {HERE / name}.png", flush=True)


if __name__ == "__main__":
    main()
