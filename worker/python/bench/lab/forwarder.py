"""Carries Ethernet frames between TAP devices of network namespaces, with a rate and a delay (network.py starts it).

    forwarder.py NAMESPACE…        device eth0 of each; the host's hardware address says which it is

Each line on standard input sets ``rate`` (bit/s of each link, each way, or null), ``delay`` (seconds, one way) and ``queue``
(seconds that a link queues before it drops), and is answered by a line. It ends with its input.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import sys
import time

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
#: Frame check sequence, preamble and gap, which a real link carries with each frame.
_OVERHEAD = 24


def tap(namespace: str) -> int:
    """File descriptor of a namespace's eth0. Moves this process there."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(place, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    os.close(place)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
    return device


class Forwarder:
    """A switch whose links take their time."""

    def __init__(self, devices: list[int]) -> None:
        self.devices = devices
        self.rate: float | None = None
        self.delay = 0.0
        self.queue = 0.05
        # When each link has sent, or handed over, all that it took.
        self._up = [0.0] * len(devices)
        self._down = [0.0] * len(devices)
        # Time, a number that keeps the order, whether it is the host's, port, frame.
        self._flying: list[tuple[float, int, bool, int, bytes]] = []
        self._count = 0

    def take(self, source: int, frame: bytes, now: float) -> None:
        """A frame that a host sent."""
        target = frame[5] - 1 if frame[:5] == b"\x02\0\0\0\0" else None
        seconds = self._seconds(frame)
        sent = max(now, self._up[source]) + seconds
        if sent - now > self.queue + seconds:
            return
        self._up[source] = sent
        everybody = range(len(self.devices))
        for port in everybody if target is None else (target,):
            if port != source and port in everybody:
                self._schedule(sent + self.delay, port, frame, handed=False)

    def hand_over(self, now: float) -> float | None:
        """Gives hosts what is due; seconds until something else is."""
        flying = self._flying
        while flying and flying[0][0] <= now:
            at, _, handed, port, frame = heapq.heappop(flying)
            if handed:
                # A host whose own queue is full loses it.
                with contextlib.suppress(BlockingIOError):
                    os.write(self.devices[port], frame)
                continue
            # Only now does it take its place on the host's link: others may have come from nearer.
            seconds = self._seconds(frame)
            done = max(at, self._down[port]) + seconds
            if done - at <= self.queue + seconds:
                self._down[port] = done
                self._schedule(done, port, frame, handed=True)
        return flying[0][0] - now if flying else None

    def _seconds(self, frame: bytes) -> float:
        return 0.0 if self.rate is None else 8 * (len(frame) + _OVERHEAD) / self.rate

    def _schedule(self, at: float, port: int, frame: bytes, *, handed: bool) -> None:
        self._count += 1
        heapq.heappush(self._flying, (at, self._count, handed, port, frame))


def main() -> None:
    devices = [tap(namespace) for namespace in sys.argv[1:]]
    forwarder = Forwarder(devices)
    ports = {device: port for port, device in enumerate(devices)}
    orders = sys.stdin.fileno()
    while True:
        wait = forwarder.hand_over(time.monotonic())
        for ready in select.select([orders, *devices], [], [], wait)[0]:
            if ready == orders:
                line = sys.stdin.readline()
                if not line:
                    return
                for name, value in json.loads(line).items():
                    setattr(forwarder, name, value)
                print("set", flush=True)
                continue
            for _ in range(64):
                try:
                    frame = os.read(ready, 65536)
                except BlockingIOError:
                    break
                forwarder.take(ports[ready], frame, time.monotonic())


if __name__ == "__main__":
    main()
