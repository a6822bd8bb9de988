"""The examples train, in both forms and with every way of averaging, on small data of the tests' own."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import example_runs
from conftest import Shards, Workers
from example_runs import EXAMPLES


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets with the names and formats of the real ones."""
    cache = tmp_path_factory.mktemp("data")
    (cache / "shakespeare.txt").write_text("To be, or not to be, that is the question. " * 500)
    (cache / "fashion-mnist").mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 256), ("t10k", 64)):
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        # The brighter, the higher the label.
        images = (25 * labels)[:, None, None].expand(count, 28, 28).contiguous()
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


SMALL = ["--width=32", "--layers=1", "--heads=2", "--context=16"]


@pytest.fixture
def run(cache: Path, shards: Callable[..., Shards], workers: Workers) -> Callable[..., dict[str, float]]:
    """Trains an example for a few steps; what came of it."""

    def train(name: str, *arguments: str) -> dict[str, float]:
        given = ["--workers=2", "--steps=24", "--warmup=2", "--batch=8", *arguments]
        result: dict[str, float] = workers.run(shards(), 2, example_runs.train, str(cache), name, given)[0]
        return result

    return train


#: Bytes of a step by element: two workers send and get whole gradients, or what the method makes of them.
BYTES = {"arc": (0.2, 4.0), "dense": (8.0, 12.0), "gloo": (8.0, 12.0), "bf16": (4.0, 7.0), "powersgd": (0.2, 4.0)}


@pytest.mark.parametrize("method", list(BYTES))
def test_gpt(run: Callable[..., dict[str, float]], method: str) -> None:
    result = run("gpt", *SMALL, f"--method={method}", "--rank=2")
    assert result["loss"] < result["untrained"]
    least, most = BYTES[method]
    assert least < result["bytes_per_step"] / result["elements"] < most
    assert result["bytes"] > 22 * result["bytes_per_step"], "the warm-up is more"


@pytest.mark.parametrize("method", ["arc", "dense"])
def test_gpt_without_a_process_group(run: Callable[..., dict[str, float]], method: str) -> None:
    result = run("gpt", *SMALL, f"--method={method}", "--form=wrapper", "--plain-adam")
    assert result["loss"] < result["untrained"]
    least, most = BYTES[method]
    assert least < result["bytes_per_step"] / result["elements"] < most


@pytest.mark.parametrize("form", ["ddp", "wrapper"])
def test_fashion(run: Callable[..., dict[str, float]], form: str) -> None:
    result = run("fashion", "--width=4", f"--form={form}")
    assert result["loss"] < result["untrained"]


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize("form", ["ddp", "wrapper"])
def test_reviews(run: Callable[..., dict[str, float]], form: str) -> None:
    result = run("reviews", f"--form={form}", "--lr=0.001")
    assert result["loss"] < result["untrained"]


def test_as_a_program(cache: Path) -> None:
    command = [sys.executable, "gpt.py", "--workers=2", "--steps=4", "--warmup=1", "--batch=2", *SMALL]
    environment = os.environ | {"ARC_DATA_CACHE": str(cache)}
    done = subprocess.run(command, check=False, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"arc \(ddp\): validation loss ([\d.]+).* ([\d.]+) MB a step", done.stdout)
    assert match, done.stdout
    assert float(match[2]) > 0.0


def test_what_does_not_fit_is_said() -> None:
    command = [sys.executable, "gpt.py", "--method=powersgd", "--form=wrapper"]
    done = subprocess.run(command, check=False, cwd=EXAMPLES, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "is a hook of DistributedDataParallel: use --form ddp" in done.stderr
