"""The ``tsqp`` command: runs the command line and turns every failure into one line and an exit code.

0 done, 1 failed, 2 wrong use, 130 interrupted (Ctrl-C), 143 terminated. ``--debug`` shows a traceback instead.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from tsqp.app.cli import app
from tsqp.errors import InputError, TsqpError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


def main() -> None:
    """Entry point of the console script."""
    # Before torch is loaded: this side and a worker take turns on the same cores, so waiting threads must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # as an exception, so that workers are stopped
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns the exit code."""
    debug = "--debug" in arguments
    try:
        result = app(
            [argument for argument in arguments if argument != "--debug"],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except KeyboardInterrupt:
        print(file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (CycloptsError, TsqpError, OSError) as error:
        if debug:
            raise
        line = " ".join(str(error).split())
        print(f"tsqp: error: {line}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE if isinstance(error, CycloptsError | InputError) else EXIT_FAILED
    return result if isinstance(result, int) else 0
