"""Where a conversation is typed and shown: as lines of a pipe, or on a terminal with what people know from others.

Covers, on a terminal: editing and history of what was typed, several lines, Ctrl-C for the answer and not for the
program, no control characters out of an answer (tests/cli/test_terminal.py, tests/cli/test_chat_terminal.py).
Does not cover: keeping the history. It is in memory alone, because prompts are written to no file.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from tsqp.errors import PromptError

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

MOST_TYPED = 1 << 16  # of a line that a terminal gives; Linux keeps 4,096 bytes of one
REPLACED = "\N{REPLACEMENT CHARACTER}"  # in place of a control character, with which an answer could move the cursor


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt at once: asyncio would cancel a task that cannot run before there is a line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Lines:
    """A line of standard input is a turn; answers go to standard output, everything else to ``console``."""

    keys: tuple[str, ...] = ()  # lines of help

    def __init__(self, console: Console) -> None:
        self._console = console

    def welcome(self, commands: Sequence[str]) -> None:
        """Say how to begin; in a pipe there is nobody to tell."""

    async def read(self) -> str | None:
        """What the user says next; None at the end. Raises PromptError for bytes that are not text."""
        try:
            with _interrupts_raised():
                return sys.stdin.readline() or None
        except UnicodeDecodeError:
            raise PromptError("the prompt is not UTF-8 text") from None

    def write(self, text: str) -> None:
        """A piece of an answer."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Something beside the conversation."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something that went wrong, after which the conversation goes on."""
        self._console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)

    def pause(self, text: str) -> None:
        """Why nothing comes for a while, maybe in the middle of an answer."""
        self.note(text)

    def status(self, text: str | None) -> None:
        """What is being done, shown until there is something else to show; None: no longer. Not in a pipe."""

    def interrupted(self, stop: Callable[[], None]) -> AbstractContextManager[None]:
        """Meanwhile Ctrl-C calls ``stop``; in a pipe it ends the program."""
        return nullcontext()


class Screen(Lines):
    """A terminal. ``source`` and ``sink``: another one than this process has."""

    keys = (
        "Enter sends; Alt-Enter or Ctrl-J begins a new line; pasted lines stay together",
        "Up and Down bring what was typed before, Ctrl-R searches it; Ctrl-C stops an answer",
    )

    def __init__(self, console: Console, *, source: Input | None = None, sink: Output | None = None) -> None:
        super().__init__(console)
        self._source, self._sink = source, sink
        self._status: Status | None = None

    def welcome(self, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory

        self._session = PromptSession[str](
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=InMemoryHistory(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            input=self._source,
            output=self._sink,
        )
        self.note("/help says what can be typed here; Ctrl-D ends")

    async def read(self) -> str | None:
        if self._source is None:
            _keep_typed_ahead(self._session.input)
        while True:
            try:
                return await self._session.prompt_async()
            except KeyboardInterrupt:
                self.note("Ctrl-D or /exit ends the chat")
            except EOFError:
                return None

    def write(self, text: str) -> None:
        super().write("".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else REPLACED for c in text))

    def pause(self, text: str) -> None:
        self.status(None)
        self._console.print()
        self.note(text)

    def status(self, text: str | None) -> None:
        if text is None:
            if self._status is not None:
                self._status.stop()
                self._status = None
        elif self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    @contextmanager
    def interrupted(self, stop: Callable[[], None]) -> Iterator[None]:
        """The second Ctrl-C ends the program, should the first have stopped nothing."""
        loop, asked = asyncio.get_running_loop(), False

        def ask() -> None:
            nonlocal asked
            if asked:
                loop.remove_signal_handler(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            asked = True
            stop()

        before = signal.getsignal(signal.SIGINT)
        loop.add_signal_handler(signal.SIGINT, ask)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)  # which makes it the one that Python has at first
            signal.signal(signal.SIGINT, before)


def terminal_for(console: Console) -> Lines:
    """What standard input is."""
    if not sys.stdin.isatty():
        return Lines(console)
    if sys.stdout.isatty():
        return Screen(console)
    from prompt_toolkit.output import create_output

    return Screen(console, sink=create_output(sys.stderr))  # the answers alone go where they were sent


def _keep_typed_ahead(source: Input) -> None:
    """Keys of lines that came while nobody asked for any are for the next prompts: the terminal had taken each Enter.

    It gives a line feed for it, which would begin a new line here and wait for another Enter.
    """
    from prompt_toolkit.input.typeahead import store_typeahead
    from prompt_toolkit.input.vt100_parser import Vt100Parser
    from prompt_toolkit.key_binding import KeyPress
    from prompt_toolkit.keys import Keys

    keys: list[KeyPress] = []
    parser, descriptor = Vt100Parser(keys.append), sys.stdin.fileno()
    while select.select([descriptor], [], [], 0)[0]:  # a whole line: the terminal keeps what has no Enter yet
        line = os.read(descriptor, MOST_TYPED)
        parser.feed_and_flush(line.decode(errors="surrogateescape").replace("\n", "\r"))
        if not line:
            keys.append(KeyPress(Keys.ControlD))
            break
    store_typeahead(source, keys)


def _keys() -> KeyBindings:
    """Enter sends, though there may be several lines."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return bindings
