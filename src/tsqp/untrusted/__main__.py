"""``python -m tsqp.untrusted``: load a model, listen, answer until told to stop.

Writes one line of JSON to standard output when it listens, ``{"address": "..."}``; logs go to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from tsqp.config.dtype import DTYPE_NAMES, ComputeDtype, DtypeName, numeric_path
from tsqp.config.worker_options import parse_worker_options
from tsqp.cores import cores
from tsqp.errors import InputError, OptionError, TsqpError
from tsqp.service_manager import READY, STOPPING, notify
from tsqp.untrusted.toolchain import check_compiler

if TYPE_CHECKING:
    from tsqp.wire.channel import Listener
    from tsqp.wire.transport.keys import WorkerKeys

EXIT_FAILED, EXIT_USAGE = 1, 2

log = logging.getLogger("tsqp.worker")


def main(arguments: list[str] | None = None) -> int:
    """Run a worker. Returns the exit code: 0 stopped, 1 failed, 2 wrong options."""
    logging.basicConfig(stream=sys.stderr, format="tsqp worker: %(message)s", level=logging.INFO)
    arguments = sys.argv[1:] if arguments is None else arguments
    # Until the worker listens, a signal ends it as an exception does: the address is given back on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        serve(parse_worker_options(arguments))
    except TsqpError as error:
        if "--debug" in arguments:
            raise
        text = error.explained(lambda field: f"--{field.replace('_', '-')}")
        print(f"tsqp worker: error: {text}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE if isinstance(error, InputError) else EXIT_FAILED
    return 0


def serve(options: argparse.Namespace) -> None:
    """Listen, load, announce, answer, until a signal or the end of standard input. Raises TsqpError."""
    if options.compile:
        if "," in options.device:
            raise OptionError("--compile is for a worker on one device: leave it out")
        check_compiler(options.device)
    # These pull in torch; wrong options and --help must not wait for it.
    import torch

    from tsqp.arith.jit import cache_name, enable_cache
    from tsqp.checkpoint import locate, open_checkpoint, stored_dtype
    from tsqp.checkpoint.cache import code_directory
    from tsqp.checkpoint.contents import read_line

    # Its own: what it writes is never loaded by a trusted side. Before the modules with loops are imported.
    kernels = code_directory("worker-kernels", cache_name())
    if kernels is not None:
        enable_cache(kernels)
        os.environ["TRITON_CACHE_DIR"] = str(kernels / "triton")  # code too, which Triton would load from anywhere
    from tsqp.untrusted.backends.device import pick_devices
    from tsqp.untrusted.compiled import Compiler
    from tsqp.untrusted.compiled_calls import CompiledCalls
    from tsqp.untrusted.store import store_on
    from tsqp.untrusted.worker import Worker
    from tsqp.wire.transport import listen, new_shm_address
    from tsqp.wire.transport.users import user_id

    torch.set_num_threads(options.threads or cores())
    devices = pick_devices(options.device)
    compiler = Compiler() if options.compile else None
    place = locate(options.model)
    checkpoint = open_checkpoint(place)
    stored = stored_dtype(place)
    dtype: ComputeDtype = stored if options.dtype == "auto" else options.dtype
    floats: DtypeName = options.dtype if options.dtype in DTYPE_NAMES else stored
    listener = listen(
        options.listen or new_shm_address(),
        security=worker_keys(options),
        insecure_plain_tcp=options.insecure_plain_tcp,
        users=[user_id(name, "allow_user") for name in options.allow_user],
        device=devices[0].index if (options.listen or "").startswith("cuda:") else None,
        watch_fd=sys.stdin.fileno() if options.exit_with_stdin else None,
    )
    with ExitStack() as stack:
        stack.enter_context(closing(listener))
        store = store_on(checkpoint, floats, devices, compiler, options.shard)
        calls = None
        stack.enter_context(closing(store.backend))  # before the listener: shared memory is unlocked while it is there
        if listener.address.startswith("shm:") and store.backend.compiled_calls and not options.no_compiled_calls:
            calls = stack.enter_context(closing(CompiledCalls()))
        worker = Worker(store, calls)
        begun = time.perf_counter()
        worker.prepare(numeric_path(dtype))  # any other path when a client asks for it
        reading_s = time.perf_counter() - begun
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: _told_to_end(listener))
        print(json.dumps({"address": listener.address}), flush=True)  # noqa: T201
        names = ",".join(map(str, devices))
        what = options.model if options.shard is None else f"shard {options.shard} of {options.model}"
        log.info("%s on %s in %s, listening on %s", what, names, dtype, listener.address)
        log.info("%s", read_line(checkpoint, reading_s))
        notify(READY, f"STATUS=listening on {listener.address}")
        worker.serve(listener)


def _told_to_end(listener: Listener) -> None:
    notify(STOPPING)
    listener.interrupt()


def worker_keys(options: argparse.Namespace) -> WorkerKeys | None:
    """The CURVE keys that the options name; None without any. Raises OptionError, AddressError, PathRefused."""
    if options.key is None and not options.allow:
        return None
    if options.key is None or not options.allow:
        raise OptionError("--key and --allow go together: this worker's secret key, and who may connect")
    from tsqp.wire.transport.keys import WorkerKeys, load_public, load_secret

    return WorkerKeys(load_secret(options.key), frozenset(load_public(path) for path in options.allow))


if __name__ == "__main__":
    sys.exit(main())
