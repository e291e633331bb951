"""What a server has for its console: the files of the page, taps, and who looks at them, one at a time."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tsqp.errors import OptionError
from tsqp.server.console.pages import Page, read_pages
from tsqp.server.errors import ApiError

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.audit.onlooker import Look
    from tsqp.trusted.tap import Tap, Taps


class Looks(Protocol):
    """See ``audit.onlooker.Onlooker``."""

    def look(self, tap: Tap, user: Sequence[int]) -> Look: ...


@dataclass
class Console:
    """``pages`` by path. ``taps``: of the model that is served."""

    taps: Taps
    onlooker: Looks
    pages: Mapping[str, Page] = field(default_factory=read_pages)
    _last: weakref.ref[Watch] | None = None

    def watch(self, prompt: Sequence[int], wanted: range) -> Watch:
        """A tap for a prompt, to look for those of its tokens. Raises ApiError while there is another."""
        last = None if self._last is None else self._last()  # whom nobody holds any more is over
        if last is not None and not last.over:
            raise ApiError(
                429,
                "one answer at a time is looked at: ask again when the other has ended",
                kind="rate_limit_error",
                code="console_busy",
                retry_after_s=1.0,
            )
        watch = Watch(self.onlooker, self.taps.new(wanted), tuple(prompt[at] for at in wanted))
        self._last = weakref.ref(watch)
        return watch


class Watch:
    """One answer that is looked at: ``tap`` has it until ``close``. ``user``: the tokens that are looked for."""

    def __init__(self, onlooker: Looks, tap: Tap, user: tuple[int, ...]) -> None:
        self.tap = tap
        self.user = user
        self._onlooker = onlooker
        self._closed = False
        self._looking: asyncio.Future[Look] | None = None

    @property
    def over(self) -> bool:
        """Whether it keeps nothing and computes nothing."""
        return self._closed and (self._looking is None or self._looking.done())

    async def look(self) -> Look:
        """What there is to see, computed on a thread. Whoever is cancelled meanwhile leaves it to its end."""
        self._looking = asyncio.ensure_future(asyncio.to_thread(self._look))  # which holds this watch meanwhile
        return await asyncio.shield(self._looking)

    def _look(self) -> Look:
        return self._onlooker.look(self.tap, self.user)

    def close(self) -> None:
        """Let go of what was seen. Closing twice is allowed."""
        self._closed = True
        self.tap.close()


def open_console(llm: LLM) -> Console:
    """The console of a model that was opened with taps. Raises OptionError for another."""
    from tsqp.audit.onlooker import Onlooker
    from tsqp.checkpoint import open_checkpoint

    if llm.taps is None:
        raise OptionError("a console needs a model that was opened with taps")
    return Console(llm.taps, Onlooker(open_checkpoint(llm.place), llm.tokenizer))
