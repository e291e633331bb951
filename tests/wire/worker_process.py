"""A worker in a process of its own: says its address in JSON, then answers every message with itself.

Usage: python worker_process.py ADDRESS [--watch-stdin]. The message ``b"silence"`` is announced and not answered.
"""

from __future__ import annotations

import json
import sys

from tsqp.errors import ChannelError
from tsqp.wire.channel import Departure
from tsqp.wire.transport import listen


def say(**facts: object) -> None:
    """One line for the test that started this process."""
    print(json.dumps(facts), flush=True)  # noqa: T201


def main() -> int:
    try:
        listener = listen(sys.argv[1], watch_fd=0 if "--watch-stdin" in sys.argv else None)
    except ChannelError as error:
        say(error=type(error).__name__)
        return 1
    say(address=listener.address)
    while (event := listener.receive(None)) is not None:
        if isinstance(event, Departure):
            continue
        if event.frames.control == b"silence":
            say(busy=True)
        else:
            listener.send(event, event.frames)
    listener.close()
    say(interrupted=listener.interrupted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
