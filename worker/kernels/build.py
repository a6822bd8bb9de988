#!/usr/bin/env python3
"""Compiles the CUDA kernels ahead of time, so that nobody else needs a CUDA toolkit.

    python3 worker/kernels/build.py            writes arc.fatbin and arc.fatbin.json, both committed
    python3 worker/kernels/build.py --check    fails if they are not what the sources make

The compiler comes from NVIDIA's wheels on PyPI (104 MB, pinned by SHA-256, through pip) and is kept in --tools, by default
target/cuda in the repository. --check compares hashes of the sources first; then, unless the compiler cannot be had (it says
so), it compiles again and compares code. Both fail if a kernel spills registers on any target.

Only the standard library is used. Exit status: 0 if all is well, 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
FATBIN = FOLDER / "arc.fatbin"
MANIFEST = FOLDER / "arc.fatbin.json"
MAIN = "arc.cu"

# Newer compilers write PTX that drivers of the 580 line refuse.
WHEELS = {
    "nvidia-cuda-nvcc==13.0.88": "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03",
    "nvidia-cuda-crt==13.0.88": "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4",
    "nvidia-cuda-cccl==13.0.85": "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649",
    "nvidia-cuda-runtime==13.0.96": "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    "nvidia-nvvm==13.0.88": "c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0",
}
# Machine code for these; PTX of the last, for what comes after.
TARGETS = ("80", "90", "100")
# A product and a sum round twice, as on the CPU.
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Werror", "all-warnings")
FATBINARY_FLAGS = ("-64", "--compress-all", "--compress-mode=size")

Usage = dict[str, dict[str, dict[str, int]]]


class Wrong(Exception):
    """What does not hold, in words for whoever runs this."""


class Unavailable(Exception):
    """The compiler cannot be had."""


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sources() -> dict[str, str]:
    """SHA-256 of every file that the kernels are compiled from."""
    files = sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")])
    return {file.name: sha256(file.read_bytes()) for file in files}


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Standard output and error of a command that succeeds."""
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, check=False, cwd=folder, env=environment, stdout=pipe, stderr=both, text=True)
    if done.returncode != 0:
        raise Wrong(f"{' '.join(command[:1])} failed:\n{done.stdout}")
    return done.stdout


def install(tools: Path) -> Path:
    """The toolkit's folder, unpacked from the wheels unless it is there."""
    wanted = sha256(json.dumps(WHEELS).encode())[:16]
    folder = tools / wanted
    toolkit = folder / "nvidia" / "cu13"
    if (folder / ".ready").exists():
        return toolkit
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in WHEELS.items()))
    print("kernels: fetching the CUDA compiler (104 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--target", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise Unavailable(done.stdout.strip())
    (folder / ".ready").touch()
    return toolkit


class Compiler:
    """nvcc's parts, run in a folder of their own so that no path of this machine gets into the code."""

    def __init__(self, toolkit: Path, work: Path) -> None:
        self.toolkit, self.work = toolkit, work
        for file in sources():
            shutil.copyfile(FOLDER / file, work / file)
        self.environment = {**os.environ, "PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}

    def version(self) -> str:
        said = run([str(self.toolkit / "bin" / "nvcc"), "--version"], self.work)
        match = re.search(r"release .*, (V\S+)", said)
        if not match:
            raise Wrong(f"nvcc does not say its version:\n{said}")
        return match.group(1)

    def nvcc(self, *arguments: str) -> str:
        """What it says."""
        return run([str(self.toolkit / "bin" / "nvcc"), *FLAGS, *arguments], self.work, self.environment)

    def compile(self, target: str) -> tuple[Path, Path, dict[str, dict[str, int]]]:
        """PTX and machine code for a target, and what each kernel uses."""
        ptx, cubin = self.work / f"compute_{target}.ptx", self.work / f"sm_{target}.cubin"
        self.nvcc(f"-arch=compute_{target}", "-ptx", "-o", ptx.name, MAIN)
        said = self.nvcc(f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v", "-o", cubin.name, ptx.name)
        return ptx, cubin, usage(said)

    def pack(self, cubins: dict[str, Path], ptx: Path) -> bytes:
        """One fatbin of them all."""
        fatbin = self.work / "arc.fatbin"
        command = [str(self.toolkit / "bin" / "fatbinary"), *FATBINARY_FLAGS, f"--create={fatbin.name}"]
        command += [f"--image3=kind=elf,sm={target},file={cubin.name}" for target, cubin in cubins.items()]
        command += [f"--image3=kind=ptx,sm={TARGETS[-1]},file={ptx.name}"]
        run(command, self.work, self.environment)
        return fatbin.read_bytes()


def usage(said: str) -> dict[str, dict[str, int]]:
    """Per kernel what `ptxas -v` says: registers, bytes spilled, of stack and of shared memory."""
    kernels: dict[str, dict[str, int]] = {}
    parts = re.split(r"Compiling entry function '(\w+)'", said)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        number = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads").search(text)
        registers = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        if not number or not registers:
            raise Wrong(f"ptxas said nothing about {name}:\n{said}")
        stack, stores, loads = (int(group) for group in number.groups())
        kernels[name] = {
            "registers": int(registers.group(1)),
            "spill_bytes": stores + loads,
            "stack_bytes": stack,
            "shared_bytes": int(shared.group(1)) if shared else 0,
        }
    if not kernels:
        raise Wrong(f"ptxas named no kernel:\n{said}")
    return dict(sorted(kernels.items()))


def build(tools: Path) -> tuple[bytes, dict[str, Any]]:
    """The fatbin and its manifest."""
    toolkit = install(tools)
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(toolkit, Path(folder))
        with ThreadPoolExecutor(max_workers=2) as pool:
            compiled = dict(zip(TARGETS, pool.map(compiler.compile, TARGETS), strict=True))
        last = compiled[TARGETS[-1]][0]
        images = {f"sm_{target}": sha256(cubin.read_bytes()) for target, (_, cubin, _) in compiled.items()}
        images["ptx"] = sha256(last.read_bytes())
        fatbin = compiler.pack({target: cubin for target, (_, cubin, _) in compiled.items()}, last)
        manifest: dict[str, Any] = {
            "sources": sources(),
            "compiler": {"nvcc": compiler.version(), "wheels": list(WHEELS), "flags": [*FLAGS], "fatbinary": [*FATBINARY_FLAGS]},
            "fatbin": {"sha256": sha256(fatbin), "bytes": len(fatbin)},
            "images": images,
            "kernels": {f"sm_{target}": used for target, (_, _, used) in compiled.items()},
        }
    refuse_spills(manifest["kernels"])
    return fatbin, manifest


def refuse_spills(kernels: Usage) -> None:
    """Fails if any kernel keeps registers in memory."""
    spilled = [
        f"{kernel} on {target}: {used['spill_bytes']} bytes"
        for target, of_target in kernels.items()
        for kernel, used in of_target.items()
        if used["spill_bytes"]
    ]
    if spilled:
        raise Wrong("registers are spilled to memory: " + "; ".join(spilled) + ". Give the kernel fewer blocks a multiprocessor.")


def check(tools: Path) -> None:
    """Compares what is committed with the sources, and with what the compiler makes of them."""
    if not (FATBIN.exists() and MANIFEST.exists()):
        raise Wrong("arc.fatbin or its manifest is missing")
    manifest = json.loads(MANIFEST.read_text())
    if sha256(FATBIN.read_bytes()) != manifest["fatbin"]["sha256"]:
        raise Wrong("arc.fatbin is not the file that its manifest describes")
    refuse_spills(manifest["kernels"])
    now, then = sources(), manifest["sources"]
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if changed:
        raise Wrong(f"the kernels were compiled before these changed: {', '.join(changed)}")
    try:
        fatbin, again = build(tools)
    except Unavailable as reason:
        print(f"kernels: the compiler cannot be had, so that only hashes were compared: {reason}")
        return
    if again != manifest or sha256(fatbin) != manifest["fatbin"]["sha256"]:
        differ = sorted(key for key in again.keys() | manifest.keys() if again.get(key) != manifest.get(key))
        raise Wrong(f"compiling again gives something else: {', '.join(differ)}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Compiles the CUDA kernels into arc.fatbin.")
    parser.add_argument("--check", action="store_true", help="compare what is committed with the sources; write nothing")
    parser.add_argument("--tools", type=Path, default=REPOSITORY / "target" / "cuda", help="where the compiler is kept")
    options = parser.parse_args()
    try:
        if options.check:
            check(options.tools)
        else:
            fatbin, manifest = build(options.tools)
            FATBIN.write_bytes(fatbin)
            MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")
    except Unavailable as reason:
        print(f"kernels: the CUDA compiler cannot be had: {reason}", file=sys.stderr)
        return 1
    except Wrong as what:
        print(f"kernels: {what}\nkernels: after a change, run worker/kernels/build.py and commit what it writes", file=sys.stderr)
        return 1
    print("kernels: arc.fatbin is what the sources make" if options.check else "kernels: arc.fatbin and its manifest are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
