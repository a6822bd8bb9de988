"""The examples train, in both forms and with every way of averaging, on small data of the tests' own."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets with the names and formats of the real ones."""
    cache = tmp_path_factory.mktemp("data")
    (cache / "shakespeare.txt").write_text("To be, or not to be, that is the question. " * 500)
    (cache / "fashion-mnist").mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 256), ("t10k", 64)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4) for size in values.shape)
            content = gzip.compress(header + values.numpy().tobytes())
            (cache / "fashion-mnist" / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    return cache


@pytest.fixture(scope="session")
def encoder(cache: Path) -> Path:
    """An encoder as small as they come, in the place of MiniLM, and sentences."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "the", "was"]
    directory = cache / "minilm"
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(words), **size)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    lines = [f"{at}\t{1.5 if at % 3 else -2.0}\tthe film was {'good' if at % 3 else 'bad'}" for at in range(200)]
    (cache / "reviews.tsv").write_text("\n".join(lines) + "\n")
    return directory


def run(cache: Path, script: str, *arguments: str) -> str:
    """What an example printed."""
    command = [sys.executable, script, "--workers=2", "--steps=6", "--warmup=2", "--batch=4", *arguments]
    environment = os.environ | {"ARC_DATA_CACHE": str(cache)}
    done = subprocess.run(command, check=False, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SMALL = ("--width=32", "--layers=1", "--heads=2", "--context=16")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method=arc", "--form=ddp"),
        ("--method=arc", "--form=wrapper", "--plain-adam"),
        ("--method=powersgd", "--rank=2"),
        ("--method=bf16",),
    ],
    ids=" ".join,
)
def test_gpt(cache: Path, arguments: tuple[str, ...]) -> None:
    said = run(cache, "gpt.py", *SMALL, *arguments)
    match = re.search(r"validation loss ([\d.]+).* ([\d.]+) MB a step", said)
    assert match, said
    assert 0.0 < float(match[1]) < 6.0
    assert float(match[2]) > 0.0


@pytest.mark.parametrize("arguments", [("--method=arc", "--form=wrapper"), ("--method=gloo",)], ids=" ".join)
def test_fashion(cache: Path, arguments: tuple[str, ...]) -> None:
    assert "accuracy" in run(cache, "fashion.py", "--width=4", *arguments)


@pytest.mark.parametrize("arguments", [("--method=arc", "--form=ddp"), ("--method=dense", "--form=wrapper")], ids=" ".join)
def test_reviews(cache: Path, encoder: Path, arguments: tuple[str, ...]) -> None:
    assert json.loads((encoder / "config.json").read_text())["hidden_size"] == 32
    assert "accuracy" in run(cache, "reviews.py", *arguments)


def test_what_does_not_fit_is_said() -> None:
    command = [sys.executable, "gpt.py", "--method=powersgd", "--form=wrapper"]
    done = subprocess.run(command, check=False, cwd=EXAMPLES, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "is a hook of DistributedDataParallel: use --form ddp" in done.stderr
