"""``python -m benchmarks.soak_server serve OPTIONS``: the command ``tsqp``, for the soak to look at.

Each line of its standard input gives freed memory back to the system, and an empty object answers. When the input ends,
so does the server.
"""

from __future__ import annotations

import os

from tsqp.api.freed_memory import give_back_freed_memory
from tsqp.bench.server_child import main


def _give_back() -> None:
    give_back_freed_memory()
    os.write(1, b"{}\n")


if __name__ == "__main__":
    main(_give_back)
