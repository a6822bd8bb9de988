#!/usr/bin/env python3
"""Keeps the chart's copies of the dashboards and Prometheus rules equal to those in `dashboards/`.

    python3 k8s/sync.py            copies what changed
    python3 k8s/sync.py --check    exit status 1 if a copy differs, is missing or should not be there

A chart can read no file outside its own directory, so it holds copies.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "dashboards"
COPIES = REPOSITORY / "k8s" / "arc-topk" / "files"


def wanted(source: Path = SOURCE) -> dict[Path, bytes]:
    """What the chart must hold, by its path below `files`."""
    files = {path.relative_to(source): path.read_bytes() for path in sorted(source.glob("grafana/*.json"))}
    rules = source / "prometheus" / "rules.yaml"
    if not files or not rules.is_file():
        raise SystemExit(f"{source}: there must be grafana/*.json and prometheus/rules.yaml")
    return files | {rules.relative_to(source): rules.read_bytes()}


def there(copies: Path = COPIES) -> dict[Path, bytes]:
    """What it holds."""
    return {path.relative_to(copies): path.read_bytes() for path in sorted(copies.rglob("*")) if path.is_file()}


def differences(source: Path = SOURCE, copies: Path = COPIES) -> list[Path]:
    """Files that are to be copied or removed."""
    want, have = wanted(source), there(copies)
    return sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))


def copy(source: Path = SOURCE, copies: Path = COPIES) -> list[Path]:
    """Makes both equal; says what changed."""
    want = wanted(source)
    changed = differences(source, copies)
    for path in changed:
        target = copies / path
        if path in want:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(want[path])
        else:
            target.unlink()
    return changed


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look")
    check = parser.parse_args().check
    for path in (changed := differences() if check else copy()):
        print(f"k8s/arc-topk/files/{path}: {'differs from dashboards/, run k8s/sync.py' if check else 'copied'}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
