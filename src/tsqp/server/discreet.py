"""What may be written of exceptions, and into the log: no values, because a value may be a prompt, an answer or a key.

Covers: exceptions that nobody caught, in the main thread, other threads, finalisers and the event loop; records of
libraries, of which the constant part alone is written (tests/server/test_discreet.py, tests/server/test_canary.py).
Does not cover: a library that puts values into the constant part of a record. Assumes: the text of a ``TsqpError`` is
as ``tsqp.errors`` says.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from tsqp.errors import TsqpError

LOGGER = "tsqp"  # records below this name are ours: they are written with their values
MAX_FRAMES = 12
MAX_CAUSES = 4


def told(error: BaseException) -> str:
    """One line: the class of an exception, where it came from, and the same of what caused it.

    Its text is in it only where it is an exception of this package, whose texts hold no secret.
    """
    lines: list[str] = []
    one: BaseException | None = error
    while one is not None and len(lines) < MAX_CAUSES:
        text = f": {' '.join(str(one).split())}" if isinstance(one, TsqpError) else ""
        lines.append(f"{type(one).__qualname__}{text}{_where(one.__traceback__)}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "; after ".join(lines)


def _where(trace: TracebackType | None) -> str:
    frames = [f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in traceback.walk_tb(trace)]
    return f" at {' < '.join(reversed(frames[-MAX_FRAMES:]))}" if frames else ""


class DiscreetFormatter(logging.Formatter):
    """Time, level, logger, message; an exception as ``told``. Of other packages' records the constant part alone."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        if record.name != LOGGER and not record.name.startswith(LOGGER + "."):
            message = record.msg if isinstance(record.msg, str) else type(record.msg).__qualname__
        else:
            message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            message = f"{message.strip()}: {told(record.exc_info[1])}"
        written = logging.makeLogRecord({**record.__dict__, "msg": " ".join(message.split()), "args": None})
        written.exc_info = written.exc_text = written.stack_info = None
        return super().format(written)


def write_logs(level: int = logging.INFO) -> None:
    """Write the log to standard error, and exceptions that nobody caught into the log. For the rest of the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(DiscreetFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(LOGGER).setLevel(level)
    # One line for each request that is no HTTP, or wants a web socket: any client could fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    log = logging.getLogger(f"{LOGGER}.server")

    def uncaught(where: str, error: BaseException | None) -> None:
        log.error("uncaught %s: %s", where, "no exception" if error is None else told(error))

    sys.excepthook = lambda _kind, error, _trace: uncaught("in the main thread", error)
    threading.excepthook = lambda args: uncaught("in a thread", args.exc_value)
    sys.unraisablehook = lambda args: uncaught("in a finaliser", args.exc_value)


def log_of_loop(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception handler for an event loop: asyncio's own writes the objects that were involved."""
    error = context.get("exception")
    if isinstance(error, ConnectionError):
        return  # a client has left
    text = str(context.get("message", "an error")).partition("\n")[0]
    logging.getLogger(f"{LOGGER}.server").error("%s%s", text, f": {told(error)}" if error is not None else "")
