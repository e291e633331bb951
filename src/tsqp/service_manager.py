"""Tells the service manager that started this process how it is: systemd's notification protocol, ``sd_notify(3)``.

The manager names a datagram socket in ``NOTIFY_SOCKET``; a message is lines of ``NAME=value``. Without a manager there
is no socket, and nothing is told.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

VARIABLE = "NOTIFY_SOCKET"
READY, STOPPING = "READY=1", "STOPPING=1"


def notify(*lines: str) -> None:
    """Tell it. Never raises and never waits: a manager that does not listen is no reason to end."""
    path = os.environ.get(VARIABLE, "")
    if not path.startswith(("/", "@")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path  # a name without a file
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
        line.setblocking(False)
        line.sendto("\n".join(lines).encode(), address)
