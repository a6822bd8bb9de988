"""What is said of bytes and times."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import jobs
from arc_topk import Config, Summary
from arc_topk._exchange import Exchange
from arc_topk.optimizer import _warn_of_adam


def test_compression_counts_both_ways():
    summary = Summary(bytes_sent=30, bytes_received=20, dense_equivalent_bytes=500)
    assert summary.compression == 20.0


def judged(caplog: pytest.LogCaptureFixture, config: Config, **figures: Any) -> list[str]:
    """What is logged once it is known whether compression pays."""
    exchange: Any = SimpleNamespace(config=config, summary=Summary(steps=config.warmup_updates + 100, **figures))
    with caplog.at_level(logging.WARNING, logger="arc_topk"):
        caplog.clear()
        Exchange._judge(exchange)
    return caplog.messages


def test_compression_that_does_not_pay_is_told(caplog):
    bytes_of = {"bytes_sent": 100, "bytes_received": 100, "dense_equivalent_bytes": 80}
    assert "averaged whole" in judged(caplog, Config(), **bytes_of)[0]
    times = {"bytes_sent": 10, "dense_equivalent_bytes": 100, "compress_seconds": 5.0, "wait_seconds": 1.0}
    assert "may not pay on this network" in judged(caplog, Config(), **times)[0]
    assert judged(caplog, Config(), **(times | {"wait_seconds": 4.0})) == []
    assert judged(caplog, Config(compressor="dense"), **bytes_of) == []


def test_plain_adam_is_told_of(caplog):
    parameters = list(jobs.model().parameters())

    def told(optimizer: torch.optim.Optimizer, **settings: Any) -> bool:
        with caplog.at_level(logging.WARNING, logger="arc_topk"):
            caplog.clear()
            _warn_of_adam(optimizer, Config(**settings))
        return bool(caplog.messages)

    adam = torch.optim.AdamW(parameters)
    assert told(adam, density=0.05)
    assert not told(adam, density=0.8) and not told(adam, compressor="dense")
    assert not told(torch.optim.SGD(parameters, lr=0.1), density=0.05)
