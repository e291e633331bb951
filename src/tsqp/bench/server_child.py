"""``python -m tsqp.bench.server_child serve OPTIONS``: the command ``tsqp``, told to end when its standard input does.

So a server that a benchmark has started ends with the benchmark, however that ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading


def _end_with_stdin() -> None:
    while os.read(0, 1):  # not by a buffer, whose lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the command in this process."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    runpy.run_module("tsqp", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
