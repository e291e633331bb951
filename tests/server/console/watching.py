"""A console without a model: who looks is a script, and what was told is read back with the names of events."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.commands import LIMIT_S
from tests.server.serving import NAME, Script, service_of
from tsqp.audit.onlooker import Look, Picture
from tsqp.server.console.console import Console
from tsqp.server.service import Service
from tsqp.trusted.tap import Tap, Taps

URL = "/console/answer"
USER = [{"role": "user", "content": "attack at dawn"}]
BODY = {"model": NAME, "messages": USER, "stream": True}
LOOK = Look(0.25, "?!", 0.5, 0.125, Picture(b"\0\xff" * 8, 4, np.arange(256), np.full(256, 1 / 256)))


class ScriptedOnlooker:
    """Sees the same in all taps. ``gate``: it looks until that is set."""

    def __init__(self) -> None:
        self.looked: list[tuple[Tap, Sequence[int]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def look(self, tap: Tap, user: Sequence[int]) -> Look:
        """See ``Onlooker``."""
        self.looked.append((tap, user))
        assert self.gate.wait(LIMIT_S)
        return LOOK


def console_service(script: Script, onlooker: ScriptedOnlooker | None = None, **changes: Any) -> Service:
    """A service with a console."""
    return service_of(script, console=Console(Taps(), onlooker or ScriptedOnlooker()), **changes)


def named_events(text: str) -> list[tuple[str | None, Any]]:
    """Every event of a stream, with its name: its JSON, or the end mark as it is."""
    events: list[tuple[str | None, Any]] = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        fields = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        if fields:
            told = {name: value for name, _, value in fields}
            data = told["data"]
            events.append((told.get("event"), data if data == "[DONE]" else json.loads(data)))
    return events
