"""A client that reads a stream to its end, and what it makes of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.commands import LIMIT_S


class Asked(NamedTuple):
    """A request for a stream with one answer."""

    path: str
    body: dict[str, Any]


@dataclass
class Told:
    """What a client makes of a stream. ``comments``: the most of them that came in a row; they are no part of it."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    comments: int = field(default=0, compare=False)

    def take(self, chunk: dict[str, Any]) -> bool:
        """Take in an event; whether it has more of the answer."""
        self.error = chunk.get("error")
        self.usage = chunk.get("usage") or self.usage
        more = False
        for choice in chunk.get("choices", ()):
            new = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            self.text += new
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            if choice.get("logprobs"):
                self.logprobs.append(choice["logprobs"])
            more = more or bool(new)
        return more


def read(
    address: str,
    asked: Asked,
    arrived: Callable[[], None] = lambda: None,
    commented: Callable[[], None] = lambda: None,
) -> Told:
    """One stream, read to its end. ``arrived`` is called for each piece of text, ``commented`` for each comment.

    An answer that is no stream has its error in the same place.
    """
    told, comments = Told(), 0
    with httpx.stream("POST", f"{address}{asked.path}", json=asked.body, timeout=LIMIT_S) as answer:
        if answer.status_code != 200:
            told.error = json.loads(answer.read())["error"]
            return told
        for line in answer.iter_lines():
            if line.startswith(":"):
                comments += 1
                told.comments = max(told.comments, comments)
                commented()
            elif line.startswith("data: "):
                assert not told.done, "nothing comes after the mark of the end"
                assert told.error is None, "nothing comes after an error"
                comments = 0
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    told.done = True
                elif told.take(json.loads(data)):
                    arrived()
    return told


class Streams:
    """Many of them at once, each read by a thread, and how far they have come together."""

    def __init__(self, pool: ThreadPoolExecutor, address: str, asked: Sequence[Asked]) -> None:
        self._pieces = 0
        self._comments = [0] * len(asked)
        self._more = threading.Condition()
        self._under_way = [
            pool.submit(read, address, one, self._arrived, partial(self._commented, number))
            for number, one in enumerate(asked)
        ]

    def wait_for(self, pieces: int) -> None:
        """Until so many more have come, of whichever stream."""
        with self._more:
            end = self._pieces + pieces
            assert self._more.wait_for(lambda: self._pieces >= end, LIMIT_S)

    def wait_for_comments(self) -> list[int]:
        """Until each stream that has not ended has had two more: the numbers of these."""
        with self._more:
            before = list(self._comments)
            waiting = [number for number, one in enumerate(self._under_way) if not one.done()]
            assert self._more.wait_for(
                lambda: all(self._comments[number] > before[number] + 1 for number in waiting), LIMIT_S
            )
            return waiting

    def told(self) -> list[Told]:
        """All of it, once they have ended."""
        return [one.result(LIMIT_S) for one in self._under_way]

    def _arrived(self) -> None:
        with self._more:
            self._pieces += 1
            self._more.notify_all()

    def _commented(self, number: int) -> None:
        with self._more:
            self._comments[number] += 1
            self._more.notify_all()


def metrics(address: str | None) -> dict[str, float]:
    """Every sample of a page of metrics, by name; those with labels of their own are summed."""
    assert address is not None
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(address, timeout=LIMIT_S).text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
