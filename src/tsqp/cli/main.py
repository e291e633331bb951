"""The ``tsqp`` command: runs the command line and turns every failure into one line and an exit code.

0 done, 1 failed, 2 wrong use, 130 interrupted (Ctrl-C), 143 terminated. ``--debug`` shows a traceback instead.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from tsqp.cli.commands import app
from tsqp.cli.flags import explained
from tsqp.cli.prompt_text import OPTION, unknown_option
from tsqp.errors import InputError, TsqpError

COMMAND = re.compile(r"[a-z0-9_-]{1,20}")
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


def main() -> None:
    """Entry point of the console script."""
    # Before torch is loaded: this side and a worker take turns on the same cores, so waiting threads must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in [name for name, value in os.environ.items() if not value and name.startswith(("TSQP_", "LLAMA_"))]:
        del os.environ[name]  # set to nothing is not set
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # as an exception, so that workers are stopped
    _open_streams_to_all_text()
    logging.basicConfig(stream=sys.stderr, format="tsqp: %(message)s", level=logging.WARNING)
    sys.exit(run(sys.argv[1:]))


def _open_streams_to_all_text() -> None:
    """An answer may hold any character: one that the output's encoding lacks becomes a question mark.

    ASCII, unless PYTHONIOENCODING asks for it, comes from a locale that says nothing about text: UTF-8 is used then.
    """
    told = "PYTHONIOENCODING" in os.environ
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            silent = not told and codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if silent else stream.encoding, errors=errors)


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns the exit code."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    try:
        is_worker = arguments[:1] == ["worker"]  # whose process reads it by itself
        ours = [argument for argument in arguments[:end] if argument != "--debug" or is_worker]
        result = _call([*ours, *arguments[end:]])
    except KeyboardInterrupt:
        print(file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (CycloptsError, TsqpError, OSError) as error:
        if debug:
            raise
        line = " ".join(_explained(error).split())
        print(f"tsqp: error: {line}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE if isinstance(error, CycloptsError | InputError) else EXIT_FAILED
    return result if isinstance(result, int) else 0


def _call(arguments: list[str]) -> object:
    """Parse, then run the command. Raises CycloptsError before anything of the command has run."""
    command, bound, unparsed = app.parse_args(arguments, exit_on_error=False, print_error=False)
    if "after_dashes" in unparsed:
        bound.arguments["after_dashes"] = "--" in arguments
    return command(*bound.args, **bound.kwargs)


def _explained(error: Exception) -> str:
    """One error as a text that repeats no prompt."""
    if isinstance(error, UnknownOptionError):
        word = error.token.keyword or error.token.value
        # The library's own text repeats the word, and suggests a name.
        return str(error) if OPTION.fullmatch(word) else unknown_option(_mistyped(error) or word)
    if isinstance(error, UnusedCliTokensError):
        count = len(error.unused_tokens or ())
        return (
            f"too many arguments, by {count}: put quotes around a text that has spaces, or look for a mistyped option"
        )
    if isinstance(error, UnknownCommandError):
        commands = [name for name in error.app or () if not name.startswith("-")]
        word = (error.unused_tokens or [""])[0]
        named = f"command {word}" if COMMAND.fullmatch(word) else "such command"  # it may be a prompt
        return f"there is no {named}: use one of {', '.join(sorted(commands))}"
    return explained(error) if isinstance(error, TsqpError) else str(error)


def _mistyped(error: UnknownOptionError) -> str:
    """What was taken for the prompt and looks like an option; nothing for an ordinary prompt."""
    arguments = error.argument_collection or ()
    prompts = (token.value for one in arguments if one.name == "PROMPT" for token in one.tokens)
    return next((prompt for prompt in prompts if prompt.startswith("--")), "")
