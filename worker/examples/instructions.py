#!/usr/bin/env python3
"""Counts the instructions of a step's hot paths, and compares them with what they were (instructions.json).

    python3 worker/examples/instructions.py             fails if a case takes more than 8 % more than before
    CARGO_INCREMENTAL=0 python3 worker/examples/instructions.py --update    writes what was counted as the new baseline

Counts do not depend on the machine's speed or load, so that a change which makes a path slower is seen where times say nothing.
They are those of two workers and a shard on one thread, for each step, without the set-up: the difference of runs of one step and
of four. Valgrind counts them, with the vector instructions that it knows (AVX2); needs valgrind (Debian: apt install valgrind).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "instructions.json"
REPOSITORY = HERE.parents[1]
#: More than this share more is a regression; more than that less, a baseline that should be written anew.
WORSE, BETTER = 0.08, 0.1
#: libc copies with one instruction a byte, as Valgrind counts it, where a processor is good at that.
#: Instead, the same loops everywhere:
SAME_LIBC = ":".join(f"glibc.cpu.x86_{name}_threshold=1000000000" for name in ("rep_movsb", "rep_stosb", "non_temporal"))
FEW, MANY = 1, 4
NEW = "new: --update"


def program() -> Path:
    """The example, built as tests are."""
    subprocess.run(["cargo", "test", "--quiet", "--locked", "--workspace", "--no-run"], cwd=REPOSITORY, check=True)
    return Path(os.environ.get("CARGO_TARGET_DIR") or REPOSITORY / "target") / "debug/examples/instructions"


def counted(built: Path, case: str, steps: int) -> int:
    """Instructions of a whole run."""
    with tempfile.NamedTemporaryFile() as scratch:
        tool = ["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={scratch.name}"]
        environment = {"PATH": os.environ["PATH"], "RAYON_NUM_THREADS": "1", "GLIBC_TUNABLES": SAME_LIBC}
        done = subprocess.run([*tool, str(built), case, str(steps)], env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"instructions: {case}: exit status {done.returncode}\n{done.stderr}")
    return int(found[1].replace(",", ""))


def verdict(now: int, before: int | None) -> str:
    """``ok``, or what is wrong."""
    if before is None:
        return NEW
    if now > before * (1 + WORSE):
        return "WORSE"
    return "better: --update" if now < before * (1 - BETTER) else "ok"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what was counted as the new baseline")
    parser.add_argument("--where-possible", action="store_true", help="without valgrind say so, and that nothing was tested")
    options = parser.parse_args()
    if shutil.which("valgrind") is None or platform.machine() != "x86_64":
        print("instructions: NOT TESTED: they are counted by valgrind on x86-64 (apt install valgrind)", file=sys.stderr)
        return 0 if options.where_possible else 1
    if options.update and os.environ.get("CARGO_INCREMENTAL") != "0":
        # It is cut into other units for the compiler, which inlines other things: up to 6 % of a case.
        print(
            "instructions: a baseline is that of a build as CI has it: CARGO_INCREMENTAL=0 make instructions ARGS=--update",
            file=sys.stderr,
        )
        return 1
    built = program()
    cases = subprocess.run([str(built)], capture_output=True, text=True, check=True).stdout.splitlines()
    before = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        few = pool.map(lambda case: counted(built, case, FEW), cases)
        many = pool.map(lambda case: counted(built, case, MANY), cases)
        now = {case: (more - less) // (MANY - FEW) for case, less, more in zip(cases, few, many, strict=True)}
    said = {case: verdict(count, before.get(case)) for case, count in now.items()}
    for case, count in now.items():
        change = f"{count / before[case] - 1:+.1%}" if case in before else ""
        print(f"instructions: {case:<22} {count / 1e6:8.2f} million a step {change:>7}  {'' if options.update else said[case]}")
    if options.update:
        BASELINE.write_text(json.dumps(now, indent=2) + "\n")
        return 0
    return 1 if {"WORSE", NEW} & set(said.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
