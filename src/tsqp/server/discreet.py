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
import warnings
from pathlib import Path
from typing import Any, TextIO

from tsqp.errors import TsqpError, TsqpWarning
from tsqp.server.under_way import request_under_way

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
        place = place_of(one)
        lines.append(f"{type(one).__qualname__}{text}{f' at {place}' if place else ''}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "; after ".join(lines)


def place_of(error: BaseException) -> str:
    """Files and lines that an exception came through, innermost first; nothing for one that was never raised."""
    frames = [f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    return " < ".join(reversed(frames[-MAX_FRAMES:]))


def about(event: str, error: BaseException | None = None, status: int | None = None) -> dict[str, object]:
    """The ``extra`` of a record of ours: a constant word for programs; the class and place of an error."""
    of_error = {} if error is None else {"error": type(error).__qualname__, "place": place_of(error)}
    return {"event": event, **of_error, **({} if status is None else {"status": status})}


def is_own(record: logging.LogRecord) -> bool:
    """Whether this package has written it."""
    return record.name == LOGGER or record.name.startswith(LOGGER + ".")


def message_of(record: logging.LogRecord) -> str:
    """One line; an exception as ``told``. Of other packages' records the constant part alone."""
    if is_own(record):
        message = record.getMessage()
    else:
        message = record.msg if isinstance(record.msg, str) else type(record.msg).__qualname__
    if record.exc_info and record.exc_info[1] is not None:
        message = f"{message.strip()}: {told(record.exc_info[1])}"
    return " ".join(message.split())


class DiscreetFormatter(logging.Formatter):
    """Time, level, logger, the id of the request where there is one, and the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        current = request_under_way()
        message = f"{'' if current is None else f'{current.request_id}: '}{message_of(record)}"
        written = logging.makeLogRecord({**record.__dict__, "msg": message, "args": None})
        written.exc_info = written.exc_text = written.stack_info = None
        return super().format(written)


def write_logs(formatter: logging.Formatter | None = None, level: int = logging.INFO) -> None:
    """Write the log to standard error, with exceptions that nobody caught and warnings. For the rest of the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter or DiscreetFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(LOGGER).setLevel(level)
    # One line for each request that is no HTTP, or wants a web socket: any client could fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    log = logging.getLogger(f"{LOGGER}.server")

    def uncaught(where: str, error: BaseException | None) -> None:
        text = "no exception" if error is None else told(error)
        log.error("uncaught %s: %s", where, text, extra=about("uncaught", error))

    def warned(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        own = issubclass(category, TsqpWarning)
        text = str(message) if own else f"{category.__qualname__} at {Path(filename).name}:{lineno}"
        log.warning("%s", text, extra=about("warning"))

    sys.excepthook = lambda _kind, error, _trace: uncaught("in the main thread", error)
    threading.excepthook = lambda args: uncaught("in a thread", args.exc_value)
    sys.unraisablehook = lambda args: uncaught("in a finaliser", args.exc_value)
    warnings.showwarning = warned


def log_of_loop(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception handler for an event loop: asyncio's own writes the objects that were involved."""
    error = context.get("exception")
    if isinstance(error, ConnectionError):
        return  # a client has left
    text = str(context.get("message", "an error")).partition("\n")[0]
    log = logging.getLogger(f"{LOGGER}.server")
    log.error("%s%s", text, f": {told(error)}" if error is not None else "", extra=about("event_loop", error))
