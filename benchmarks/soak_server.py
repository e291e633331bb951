"""``python -m benchmarks.soak_server serve OPTIONS``: the command ``tsqp``, for the soak to look at.

Each line of its standard input gives freed memory back to the system, and an empty line of standard output answers.
When the input ends, so does the server.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading

from tsqp.api.freed_memory import give_back_freed_memory


def _follow_stdin() -> None:
    while order := os.read(0, 1):  # not by a buffer, whose lock would be held when the interpreter ends
        give_back_freed_memory()
        os.write(1, order)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the command in this process."""
    threading.Thread(target=_follow_stdin, daemon=True).start()
    runpy.run_module("tsqp", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
