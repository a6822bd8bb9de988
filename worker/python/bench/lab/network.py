"""Hosts on one machine, each in a network namespace behind a link of its own (root, iproute2; nftables for loss).

Two kinds of network. *Kernel*: each host has a veth into a bridge, and both of its ends are shaped by ``tbf``. *Forwarded*: each
host has a TAP device, and a process (forwarder.py) carries the frames between them; rates and delays are its own. The second costs
processor time, and is used for delay alone, for which there is no ``netem`` on every machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PREFIX = "arc-links"
#: What a shaped link queues before it drops, in both kinds of network.
QUEUE_SECONDS = 0.05


class LabError(Exception):
    """What cannot be had on this machine, and what to do."""


@dataclasses.dataclass(frozen=True)
class Link:
    """What every host's link is like."""

    #: Bit/s each way; ``None``: as fast as the machine is.
    rate: float | None = None
    #: Milliseconds that a round trip takes longer.
    delay: float = 0.0
    #: Share of the packets that each host loses of those that reach it.
    loss: float = 0.0

    @property
    def words(self) -> str:
        """For tables."""
        rate = "unshaped"
        if self.rate is not None:
            rate = f"{self.rate / 1e9:g} Gbit/s" if self.rate >= 1e9 else f"{self.rate / 1e6:g} Mbit/s"
        delay = f", {self.delay:g} ms" if self.delay else ""
        return rate + delay + (f", {100 * self.loss:g} % lost" if self.loss else "")


def do(command: str, namespace: str | None = None) -> str:
    """Runs a command, words separated by blanks, in a namespace; what it printed."""
    words = [*(("ip", "netns", "exec", namespace) if namespace else ()), *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(words)}`: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def check(links: Sequence[Link]) -> None:
    """That this machine can make such links."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise LabError("network namespaces and shaped links need root on Linux: run it with sudo")
    programs = {"ip": "iproute2", "tc": "iproute2"} | ({"nft": "nftables"} if any(link.loss for link in links) else {})
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if missing:
        raise LabError(f"{' and '.join(missing)} not found: apt install {' '.join(missing)}")
    if any(link.delay for link in links) and not Path("/dev/net/tun").exists():
        raise LabError("/dev/net/tun is not there, which delays need: measure without --delays")


class Network:
    """Hosts and their links. Use it as a context: its end takes all namespaces away."""

    def __init__(self, hosts: int, *, forwarded: bool) -> None:
        self.hosts = [f"{PREFIX}-{os.getpid()}-{index}" for index in range(hosts)]
        self._switch = f"{PREFIX}-{os.getpid()}-switch"
        self._forwarder: subprocess.Popen[str] | None = None
        self._forwarded = forwarded

    def __enter__(self) -> Network:
        remove_stale()
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._forwarder is not None:
            self._forwarder.terminate()
            self._forwarder.wait()
        for name in (*self.hosts, self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @staticmethod
    def address(index: int) -> str:
        """Of a host."""
        return f"10.214.0.{index + 1}"

    def shape(self, link: Link) -> None:
        """Makes all links alike, from now on."""
        if self._forwarder is not None:
            self._tell({"rate": link.rate, "delay": link.delay / 2e3})
        elif link.delay:
            raise LabError("a delay needs a forwarded network")
        for index, host in enumerate(self.hosts):
            if self._forwarder is None:
                self._shape_device(host, "eth0", link.rate)
                self._shape_device(self._switch, f"port{index}", link.rate)
            if shutil.which("nft"):
                do("nft flush chain ip links in", host)
                if link.loss:
                    per = f"numgen random mod 10000 < {round(1e4 * link.loss)}"
                    do(f"nft add rule ip links in iifname eth0 {per} drop", host)

    def popen(self, index: int, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Starts a program on a host. ``ip`` becomes it, so that the process is its own."""
        words = ["ip", "netns", "exec", self.hosts[index], *command]
        return subprocess.Popen(words, text=True, **options)  # type: ignore[call-overload]

    def _build(self) -> None:
        for name in (*self.hosts, self._switch):
            do(f"ip netns add {name}")
        if not self._forwarded:
            do("ip link add hub type bridge", self._switch)
            do("ip link set hub up", self._switch)
        for index, host in enumerate(self.hosts):
            if self._forwarded:
                do("ip tuntap add dev eth0 mode tap", host)
                do(f"ip link set eth0 address {mac(index)}", host)
            else:
                do(f"ip link add port{index} type veth peer name eth0 netns {host}", self._switch)
                do(f"ip link set port{index} master hub up", self._switch)
            do("ip link set lo up", host)
            do(f"ip address add {self.address(index)}/16 dev eth0", host)
            do("ip link set eth0 up", host)
            if shutil.which("nft"):
                do("nft add table ip links", host)
                do("nft add chain ip links in { type filter hook input priority 0 ; }", host)
        if self._forwarded:
            command = [sys.executable, str(Path(__file__).with_name("forwarder.py")), *self.hosts]
            self._forwarder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._tell({"rate": None, "delay": 0.0})

    def _tell(self, what: dict[str, object]) -> None:
        forwarder = self._forwarder
        assert forwarder is not None and forwarder.stdin is not None and forwarder.stdout is not None
        forwarder.stdin.write(json.dumps({"queue": QUEUE_SECONDS} | what) + "\n")
        forwarder.stdin.flush()
        if not forwarder.stdout.readline():
            raise LabError(f"the forwarder has ended with exit status {forwarder.wait()}")

    def _shape_device(self, namespace: str, device: str, rate: float | None) -> None:
        if rate is None:
            with contextlib.suppress(LabError):
                do(f"tc qdisc del dev {device} root", namespace)
            return
        # A burst of 2 ms, and no less than a packet that was not cut yet has.
        burst = max(70_000, round(rate / 8 * 0.002))
        shape = f"tbf rate {round(rate)}bit burst {burst} latency {round(1e3 * QUEUE_SECONDS)}ms"
        do(f"tc qdisc replace dev {device} root {shape}", namespace)


def mac(index: int) -> str:
    """The hardware address of a host in a forwarded network."""
    return f"02:00:00:00:00:{index + 1:02x}"


def remove_stale() -> None:
    """Takes away the namespaces of runs that are no more."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        name = line.split()[0] if line.split() else ""
        if name.startswith(f"{PREFIX}-") and not Path("/proc", name.removeprefix(f"{PREFIX}-").split("-")[0]).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
