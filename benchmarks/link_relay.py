"""A line between two network namespaces, with delay, loss and a rate: as ``tc netem`` makes it where the kernel can.

    python -m benchmarks.link_relay NAMESPACE --addresses 198.18.0.1 198.18.0.2 [--delay 0.025] [--loss 0.01]

Two devices (TUN), one here and one in the namespace; this process carries the packets from one to the other, each way
by itself. It says so in a line on standard output, and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 9000  # few packets, since each costs some 10 µs of Python
QUEUE_BYTES = 4 << 20  # that wait for the rate; what comes then is dropped, as by any switch
Clock = Callable[[], float]


class Way:
    """One direction. ``delay_s``: of each packet; ``loss``: the share that is dropped; ``rate``: bytes a second."""

    def __init__(self, delay_s: float, loss: float, rate: float | None, chance: random.Random) -> None:
        self._delay_s, self._loss, self._rate, self._chance = delay_s, loss, rate, chance
        self._free_s = 0.0  # when the line has sent what it has
        self._waiting: deque[tuple[float, bytes]] = deque()
        self.dropped = 0

    def put(self, packet: bytes, now_s: float) -> None:
        """Take a packet, or drop it."""
        begin_s = max(now_s, self._free_s)
        full = self._rate is not None and (begin_s - now_s) * self._rate > QUEUE_BYTES
        if full or self._chance.random() < self._loss:
            self.dropped += 1
            return
        self._free_s = begin_s if self._rate is None else begin_s + len(packet) / self._rate
        self._waiting.append((self._free_s + self._delay_s, packet))

    def due(self, now_s: float) -> list[bytes]:
        """The packets that have arrived by now, in their order."""
        arrived = []
        while self._waiting and self._waiting[0][0] <= now_s:
            arrived.append(self._waiting.popleft()[1])
        return arrived

    @property
    def next_s(self) -> float | None:
        """When the next one arrives."""
        return self._waiting[0][0] if self._waiting else None


def relay(devices: tuple[int, int], ways: tuple[Way, Way], end: int, clock: Clock = time.monotonic) -> None:
    """Carry packets until there is something to read from ``end``, or it ends."""
    while True:
        times = [way.next_s for way in ways if way.next_s is not None]
        wait_s = max(0.0, min(times) - clock()) if times else None
        ready, _, _ = select.select([*devices, end], [], [], wait_s)
        if end in ready:
            return
        for device, way in zip(devices, ways, strict=True):
            while device in ready:
                try:
                    way.put(os.read(device, MTU + 100), clock())
                except BlockingIOError:
                    break
        for other, way in zip(reversed(devices), ways, strict=True):
            for packet in way.due(clock()):
                try:
                    os.write(other, packet)
                except BlockingIOError:
                    way.dropped += 1


def open_device(name: str) -> int:
    """A TUN device of this name; it goes when the descriptor is closed. Raises OSError."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def main() -> None:
    """Open, say so, carry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("namespace")
    parser.add_argument("--addresses", nargs=2, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--rate", type=float, help="bytes a second")
    options = parser.parse_args()
    names = [f"tsqp{os.getpid() % 10**7}{side}" for side in "ab"]
    here, there = (open_device(name) for name in names)
    inside = ["ip", "netns", "exec", options.namespace]
    run = [["ip", "link", "set", names[1], "netns", options.namespace]]
    for name, address, other, before in (
        (names[0], *options.addresses, []),
        (names[1], *reversed(options.addresses), inside),
    ):
        run.append([*before, "ip", "address", "add", address, "peer", other, "dev", name])
        run.append([*before, "ip", "link", "set", name, "up", "mtu", str(MTU)])
    for command in run:
        subprocess.run(command, check=True)
    chance = random.Random(0)
    ways = tuple(Way(options.delay, options.loss, options.rate, chance) for _ in range(2))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    relay((here, there), (ways[0], ways[1]), sys.stdin.fileno())


if __name__ == "__main__":
    main()
