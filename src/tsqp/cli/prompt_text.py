"""Where a command's prompt comes from: an argument, standard input or a file."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tsqp.cli.help_groups import TEXT
from tsqp.config.protection import PROTECTIONS
from tsqp.errors import InputError, OptionError, PromptError

if TYPE_CHECKING:
    from rich.console import Console

_UNREADABLE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that the locale cannot read
OPTION = re.compile(r"--?\w[\w-]{0,30}")

PromptArgument = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
PromptFile = Annotated[
    Path | None,
    Parameter(allow_leading_hyphen=True, group=TEXT, help="Read the prompt from a file; - for standard input."),
]
AfterDashes = Annotated[bool, Parameter(parse=False)]  # whether the command line has a --: the prompt is no option then


def prompt_text(prompt: str | None, prompt_file: Path | None, after_dashes: bool) -> str:
    """The prompt from exactly one of argument, standard input and file. Raises InputError."""
    if (prompt is None) == (prompt_file is None):
        raise InputError("give one prompt: as an argument, - for standard input, or --prompt-file FILE")
    if prompt is not None and prompt != "-":
        if prompt.startswith("-") and not after_dashes:
            raise OptionError(unknown_option(prompt))
        return argument_text(prompt)
    try:
        from_stdin = prompt_file is None or str(prompt_file) == "-"
        text = sys.stdin.buffer.read() if from_stdin or prompt_file is None else prompt_file.read_bytes()
        return text.decode().removesuffix("\n")  # the one that every editor and echo adds
    except OSError as error:
        where = prompt_file or "standard input"
        raise InputError(f"cannot read the prompt: {error.strerror or error}: {where}") from None
    except UnicodeDecodeError:
        raise PromptError("the prompt is not UTF-8 text") from None


def argument_text(argument: str, what: str = "the prompt") -> str:
    """An argument as the text that it is in UTF-8, also where the locale knows ASCII alone. Raises PromptError."""
    if not _UNREADABLE.search(argument):
        return argument
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise PromptError(f"{what} is not UTF-8 text") from None


def warn_of_argument(prompt: str | None, protection: str, console: Console) -> None:
    """One line, in a private mode: a prompt that was an argument is no secret any more."""
    if prompt not in (None, "-") and PROTECTIONS[protection].checked:
        line = "warning: everybody on this host can read a prompt that is an argument: use - or --prompt-file"
        console.print(line, style="yellow", soft_wrap=True)


def unknown_option(word: str) -> str:
    """The error for something that begins with a hyphen. It may be a prompt, which is not repeated."""
    name = word.partition("=")[0]
    what = f"unknown option {name}" if OPTION.fullmatch(name) else "that is no option"
    return f"{what}; a prompt that begins with a hyphen goes last, after --"
