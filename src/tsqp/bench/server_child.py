"""``python -m tsqp.bench.server_child serve OPTIONS``: the command ``tsqp``, told to end when its standard input does.

So a server that a benchmark has started ends with the benchmark, however that ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
from collections.abc import Callable


def _follow_stdin(on_line: Callable[[], None]) -> None:
    while byte := os.read(0, 1):  # not by a buffer, whose lock would be held when the interpreter ends
        if byte == b"\n":
            on_line()
    os.kill(os.getpid(), signal.SIGTERM)


def main(on_line: Callable[[], None] = lambda: None) -> None:
    """Run the command in this process. ``on_line`` is called for each line of standard input."""
    threading.Thread(target=_follow_stdin, args=(on_line,), daemon=True).start()
    runpy.run_module("tsqp", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
