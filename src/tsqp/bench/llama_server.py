"""``python -m tsqp.bench.llama_server FILE CONTEXT THREADS SLOTS``: llama.cpp's own server for ``--peer llama.cpp``.

It listens on a free port of 127.0.0.1 and ends when standard input does.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Load the model, say where, answer until standard input ends."""
    path, context, threads, slots = sys.argv[1:]
    # Our own processes wait passively (docs/adr/0013), llama.cpp's barriers between operators would lose time by it.
    os.environ.pop("OMP_WAIT_POLICY", None)
    import xllamacpp  # only now: OpenMP reads its settings when it is loaded

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx = int(context) * int(slots)  # shared out among the slots
    settings.n_parallel = int(slots)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    settings.fit_params = False  # what is asked for holds, whatever memory is free
    settings.cache_ram_mib = settings.n_ctx_checkpoints = 0  # no copies of the KV cache: every prompt is a new one
    settings.verbosity = 1  # errors only
    server = xllamacpp.Server(settings)
    print(json.dumps({"address": server.listening_address}), flush=True)  # noqa: T201
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
