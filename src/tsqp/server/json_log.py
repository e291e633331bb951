"""The log as JSON: one object a line, with the fields of ``Line`` and no others.

Covers: a record adds no field, and none of another type, whatever it carries; ``message`` is what the text log says,
so it holds no value of a foreign exception or record (tests/server/test_json_log.py, tests/server/test_canary.py).
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Literal

import msgspec

from tsqp.server.discreet import DiscreetFormatter, about, is_own, message_of
from tsqp.server.under_way import request_under_way

LogFormat = Literal["text", "json"]

OTHER, FOREIGN = "other", "library"  # the words for a record of ours that has none, and for another package's

_EVENT = re.compile(r"[a-z][a-z_]{0,39}")


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """The allow-list. ``event``: a constant word; ``error``: a class; ``place``: files and lines, innermost first."""

    time: str  # UTC, ISO 8601
    level: str
    logger: str
    event: str
    message: str
    request_id: str | None = None
    endpoint: str | None = None
    status: int | None = None
    error: str | None = None
    place: str | None = None


class JsonFormatter(DiscreetFormatter):
    """See the module."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        given = vars(record) if is_own(record) else {"event": FOREIGN}
        if record.exc_info and record.exc_info[1] is not None:
            given = {**about(OTHER, record.exc_info[1]), **given}
        event, status = given.get("event"), given.get("status")
        current = request_under_way()
        line = Line(
            time=datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            level=record.levelname.lower(),
            logger=record.name,
            event=event if isinstance(event, str) and _EVENT.fullmatch(event) else OTHER,
            message=message_of(record),
            request_id=None if current is None else current.request_id,
            endpoint=None if current is None else current.endpoint,
            status=status if isinstance(status, int) else None,
            error=_text(given.get("error")),
            place=_text(given.get("place")),
        )
        return msgspec.json.encode(line).decode()


def formatter_of(form: LogFormat) -> logging.Formatter:
    """For a log in that form."""
    return JsonFormatter() if form == "json" else DiscreetFormatter()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
