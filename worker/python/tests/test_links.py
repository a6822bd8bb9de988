"""What the link lab (bench/links.py) computes; its networks need root and are tried by `make bench-links`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from lab import forwarder, network, report
from lab.network import Link
from shapes import shape_of


def frame(target: int, size: int = 976) -> bytes:
    return bytes.fromhex(network.mac(target).replace(":", "")) + bytes(size - 6)


@pytest.fixture
def pipes():
    """Three devices whose frames can be read back."""
    made = [os.pipe() for _ in range(3)]
    for end, _ in made:
        os.set_blocking(end, False)
    yield made
    for ends in made:
        for end in ends:
            os.close(end)


def test_a_frame_waits_for_both_links_and_the_delay(pipes):
    forward = forwarder.Forwarder([end for _, end in pipes])
    # 1000 bytes with what a link adds: 8 ms at 1 Mbit/s.
    forward.rate, forward.delay = 1e6, 0.1
    forward.take(0, frame(1), now=10.0)
    forward.take(0, frame(1), now=10.0)
    assert forward.hand_over(10.115) == pytest.approx(0.001)
    assert forward.hand_over(10.1161) == pytest.approx(0.0079), "the second one left 8 ms later"
    assert forward.hand_over(10.2) is None
    assert os.read(pipes[1][0], 10_000) == 2 * frame(1)
    with pytest.raises(BlockingIOError):
        os.read(pipes[2][0], 1)


def test_two_senders_share_one_link_and_a_full_queue_drops(pipes):
    forward = forwarder.Forwarder([end for _, end in pipes])
    forward.rate, forward.queue = 1e6, 0.02
    for _ in range(5):
        forward.take(0, frame(2), now=0.0)
    forward.take(1, frame(2), now=0.0)
    # Three of worker 0's fit into its queue; worker 1's comes to host 2 with the first of them and leaves after it.
    forward.hand_over(1.0)
    assert len(os.read(pipes[2][0], 100_000)) == 4 * 976


def test_a_broadcast_reaches_everybody_else(pipes):
    forward = forwarder.Forwarder([end for _, end in pipes])
    forward.take(0, b"\xff" * 60, now=0.0)
    forward.hand_over(0.0)
    assert [os.read(pipes[port][0], 100) for port in (1, 2)] == [b"\xff" * 60] * 2


@pytest.mark.parametrize(
    ("own", "peer", "found"),
    [
        ({1e8: 1.0, 1e9: 1.0}, {1e8: 2.0, 1e9: 1.5}, "at no rate measured"),
        ({1e8: 1.0, 1e9: 1.0, math.inf: 1.0}, {1e8: 2.0, 1e9: 0.9, math.inf: 0.5}, "between 100 Mbit/s and 1 Gbit/s"),
        ({1e8: 1.0, math.inf: 1.0}, {1e8: 2.0, math.inf: 0.5}, "between 100 Mbit/s and unshaped"),
        ({1e8: 3.0, 1e9: 1.0}, {1e8: 2.0, 1e9: 0.5}, "at all rates measured"),
        ({1e8: 3.0, 1e9: 1.0}, {1e8: 2.0, 1e9: 1.5}, "at 100 Mbit/s"),
    ],
)
def test_crossover(own, peer, found):
    assert report.crossover(own, peer) == found


def record(arm: str, seconds: float, rate: float = 2e8) -> dict[str, object]:
    plain = {"shape": "60m", "workers": 4, "shards": 4, "colocated": True, "rate": rate, "delay": 0.0, "loss": 0.0}
    bytes_of = {"sent": 5e6, "received": 4e6, "sent_0": 5e6, "received_0": 4e6, "payload": 8e6 if arm.startswith("arc") else 0.0}
    return plain | bytes_of | {"arm": arm, "seconds": seconds, "worker_cpu": 2.0, "shard_cpu": 0.5}


def test_table_takes_the_control_off():
    text = report.table([record("none", 0.5), record("dense", 10.5), record("arc-0.2-int4", 0.9)], "four workers")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| none | 0.500 |  |  |  |  |  | 2.00, 0.50 |",
        "| dense | 10.500 | 10.000 | 1 | 5.00 |  | 2% | 2.00, 0.50 |",
        "| arc-0.2-int4 | 0.900 | 0.400 | 1/25.0 | 5.00 | 0.750 | 22% | 2.00, 0.50 |",
    ]


def test_links_in_words():
    assert Link(2e8, 10.0, 0.001).words == "200 Mbit/s, 10 ms, 0.1 % lost"
    assert Link().words == "unshaped"


def test_shapes_may_have_fewer_layers():
    assert shape_of("1b") == (2048, 5461, 24, 32000)
    assert shape_of("1b-12") == (2048, 5461, 12, 32000)
    for wrong in ("2b", "1b-x", "60m-9", "60m-0"):
        with pytest.raises(ValueError, match="60m"):
            shape_of(wrong)
