"""A loopback interface for this process and its children alone, and the bytes that it has carried (Linux)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_CLONE_NEWUSER = 0x10000000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def isolate() -> bool:
    """Moves this process, and those that it will start, into a network namespace of their own: others' bytes are not counted.

    False where the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0 and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = b"lo".ljust(16, b"\0")
        asked = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, name + bytes(24))
        (flags,) = struct.unpack_from("=h", asked, 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, name + struct.pack("=h", flags | _IFF_UP) + bytes(22))
    return True


def carried() -> int:
    """Bytes that loopback has carried so far; each counts once.

    What is handed to it in one piece has one set of headers there, which a real link would have in every packet (3 % of TCP).
    """
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0
