"""Settings, and what is said of wrong ones."""

from __future__ import annotations

import pytest
import torch

import arc_topk
from arc_topk import Config, ConfigError, Peers


def test_settings_are_those_of_the_native_half():
    assert "densities" not in Config().algorithm()
    assert Config(densities={"embed.*": 0.05, "*": 0.5}).density_of("embed.weight") == 0.05
    assert Config().density_of("embed.weight") is None


@pytest.fixture
def certs(tmp_path):
    worker = tmp_path / "worker"
    worker.mkdir()
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (worker / name).write_text("not a certificate")
    return tmp_path


def test_peers_come_from_arguments_the_environment_or_torchrun(certs, monkeypatch):
    for name in ("ARC_SHARD_ADDRESSES", "ARC_CERTS", "MASTER_ADDR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no shards are known"):
        Peers.find(certs=certs)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = Peers.find(certs=certs)
    assert (found.shards, found.rank, found.world_size) == (("head:7400",), 3, 8)
    monkeypatch.setenv("ARC_SHARD_ADDRESSES", "a:1, b:2")
    monkeypatch.setenv("ARC_CERTS", str(certs))
    found = Peers.find()
    assert found.shards == ("a:1", "b:2") and found.cert.endswith("worker/cert.pem")
    assert Peers.find(["c:3"]).shards == ("c:3",)
    with pytest.raises(ConfigError, match="rank is 'first'"):
        Peers.find(rank="first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pass a directory with ca\.pem"):
        Peers.find(certs="/nowhere")


def test_what_is_wrong_is_named_before_anything_is_connected(certs):
    arc_topk.init(["127.0.0.1:1"], certs=certs)
    net = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def wrapped(**settings):
        return arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), **settings)

    with pytest.raises(ConfigError, match="density"):
        wrapped(density=1.5)
    with pytest.raises(ConfigError, match=r"energy is 1\.5, but must be above 0 and at most 1"):
        wrapped(energy=1.5)
    with pytest.raises(ConfigError, match=r"energy is 0\.9, but must be 1 unless the compressor is arc"):
        wrapped(compressor="randk", energy=0.9)
    with pytest.raises(ConfigError, match=r"^compressor: unknown variant"):
        wrapped(compressor="zip")
    with pytest.raises(ConfigError, match=r"^wire_up: unknown variant `fp8`, expected one of .*`int4`$"):
        wrapped(wire_up="fp8")
    with pytest.raises(TypeError, match="no setting densty: did you mean density"):
        wrapped(densty=0.5)
    with pytest.raises(ConfigError, match="no feedback state of arc_topk"):
        wrapped(state={"junk": 1})
    with pytest.raises(ConfigError, match=r"cert|pem"):
        wrapped()
    with pytest.raises(ConfigError, match="named_parameters does not name"):
        arc_topk.DistributedOptimizer(optimizer, [])
    with pytest.raises(ConfigError, match="no DistributedDataParallel"):
        arc_topk.register(net)
    with pytest.raises(ConfigError, match="complex64 cannot be averaged"):
        arc_topk.all_reduce([torch.zeros(3, dtype=torch.complex64)])
    with pytest.raises(arc_topk.ArcError, match="not in a job yet"):
        arc_topk.summary()


def test_the_environment_counts_as_it_is_when_a_job_is_joined(certs, monkeypatch):
    monkeypatch.setattr(arc_topk._state, "_peers", None)
    monkeypatch.setenv("ARC_SHARD_ADDRESSES", "a:1")
    monkeypatch.setenv("ARC_CERTS", str(certs))
    assert arc_topk._state.peers().shards == ("a:1",)
    monkeypatch.setenv("ARC_SHARD_ADDRESSES", "b:2")
    assert arc_topk._state.peers().shards == ("b:2",)
