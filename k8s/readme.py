#!/usr/bin/env python3
"""Makes the table of values in `arc-topk/README.md` from the comments in `arc-topk/values.yaml` that start with `--`.

    python3 k8s/readme.py            writes it
    python3 k8s/readme.py --check    exit status 1 if it is not what would be written, or a value has no comment

A key with such a comment is a line of the table, with all that is below it as its default. A key without one must hold others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent / "arc-topk"
VALUES, README = CHART / "values.yaml", CHART / "README.md"
BEGIN, END = "<!-- values: made by k8s/readme.py -->\n", "<!-- end of values -->\n"


def comment(lines: list[str], line: int) -> str | None:
    """The `--` comment that ends right above `line`."""
    found: list[str] = []
    for above in reversed(lines[:line]):
        text = above.strip()
        if not text.startswith("#"):
            break
        found.insert(0, text[1:].strip())
        if text.startswith("# -- "):
            return " ".join(found)[3:]
    return None


def rows(node: yaml.MappingNode, lines: list[str], path: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and description of every value below `node`."""
    for key, value in node.value:
        own = f"{path}.{key.value}" if path else key.value
        description = comment(lines, key.start_mark.line)
        if description is None:
            if not isinstance(value, yaml.MappingNode) or not value.value:
                raise SystemExit(f"values.yaml: {own} has no comment that starts with --")
            yield from rows(value, lines, own)
        else:
            default = yaml.safe_load(yaml.serialize(value))
            yield own, "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`", description


def table() -> str:
    """The table, one for each key at the top."""
    text = VALUES.read_text()
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode)
    cells = [(f"`{key}`", default, what) for key, default, what in rows(node, text.splitlines())]
    lines = ["| key | default | what it is |", "|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def made() -> str:
    """The whole file, the rest of it as it is."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table() + "\n" + END + after


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look")
    text = made()
    if not parser.parse_args().check:
        README.write_text(text)
    elif README.read_text() != text:
        print("k8s/arc-topk/README.md is out of date, run k8s/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
