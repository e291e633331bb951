"""Two network namespaces with a line between them that is as long, as slow and as bad as one asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = "198.18.0.1", "198.18.0.2"  # of the range that is kept for benchmarks: RFC 2544
START_S = 30.0


@dataclass(frozen=True)
class Condition:
    """A line. ``rtt_s``: there and back; ``loss``: share of packets, each way; ``rate``: bytes a second, each way."""

    name: str
    rtt_s: float = 0.0
    loss: float = 0.0
    rate: float | None = None


@dataclass(frozen=True)
class Network:
    """``host``: the address inside of the namespace; ``inside``: a command that runs another there."""

    host: str
    inside: tuple[str, ...]


def why_not() -> str | None:
    """What this machine lacks for a network; None where nothing is missing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no ip: iproute2 is not installed"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    name = f"tsqp-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"ip netns add: {tried.stderr.strip()[:200]}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@contextmanager
def network(condition: Condition) -> Iterator[Network]:
    """A namespace that is reached over such a line, until the context ends. Raises OSError, CalledProcessError."""
    name = f"tsqp-{os.getpid()}"
    inside = ("ip", "netns", "exec", name)
    subprocess.run(["ip", "netns", "add", name], check=True)
    relay: subprocess.Popen[bytes] | None = None
    try:
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        options = ["--delay", str(condition.rtt_s / 2), "--loss", str(condition.loss)]
        options += [] if condition.rate is None else ["--rate", str(condition.rate)]
        command = [sys.executable, "-m", "benchmarks.link_relay", name, "--addresses", *ADDRESSES, *options]
        root = Path(__file__).parents[1]
        relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
        if relay.stdout is None or relay.stdout.readline() != b"ready\n":
            raise OSError("the relay did not start; what it said is above")
        yield Network(ADDRESSES[1], inside)
    finally:
        if relay is not None:
            for pipe in (relay.stdin, relay.stdout):
                if pipe is not None:
                    pipe.close()
            with suppress(subprocess.TimeoutExpired):
                relay.wait(START_S)
            relay.kill()
            relay.wait()
        subprocess.run(["ip", "netns", "delete", name], check=True)
