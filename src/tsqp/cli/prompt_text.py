"""Where a command's prompt comes from (an argument, standard input or a file), and what a chat template is told."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tsqp.cli.help_groups import TEXT
from tsqp.config.protection import PROTECTIONS
from tsqp.errors import InputError, OptionError, PromptError
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.text.conversation import refuse_bad_name

if TYPE_CHECKING:
    from rich.console import Console

_UNREADABLE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that the locale cannot read
OPTION = re.compile(r"--?\w[\w-]{0,30}")
NUMBER = re.compile(
    r"-?(0|[1-9]\d{0,30})(\.\d{1,30})?([eE][+-]?\d{1,3})?", re.ASCII
)  # as JSON writes them; longer is text

PromptArgument = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
PromptFile = Annotated[
    Path | None,
    Parameter(allow_leading_hyphen=True, group=TEXT, help="Read the prompt from a file; - for standard input."),
]
Raw = Annotated[
    bool,
    Parameter(
        group=TEXT,
        help="Send the text as it is, without the chat template. A control token that is written in the text, such as "
        "the end of a turn, is that token then; without --raw it is only letters.",
    ),
]
TemplateArgs = Annotated[
    tuple[str, ...],
    Parameter(
        name="--template-arg",
        group=TEXT,
        help="NAME=VALUE for the chat template, such as enable_thinking=false; may be given again. A value is true, "
        "false, none, a number, JSON (for tools and documents), or else text.",
    ),
]
AfterDashes = Annotated[bool, Parameter(parse=False)]  # whether the command line has a --: the prompt is no option then


def prompt_text(prompt: str | None, prompt_file: Path | None, after_dashes: bool) -> str:
    """The prompt from exactly one of argument, standard input and file. Raises InputError, for an empty one too."""
    text = _given_text(prompt, prompt_file, after_dashes)
    if not text.strip():
        raise PromptError("the prompt is empty: give some text")  # before a model is loaded for it
    return text


def _given_text(prompt: str | None, prompt_file: Path | None, after_dashes: bool) -> str:
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


def readable(sampling: SamplingParams) -> SamplingParams:
    """The same sampling with stop strings as the text that they are in UTF-8. Raises PromptError."""
    return replace(sampling, stop=tuple(argument_text(text, "--stop") for text in sampling.stop))


def template_args(given: Sequence[str], *, raw: bool = False) -> dict[str, object]:
    """The variables of a chat template by name. Raises OptionError, which repeats no value: it may be a secret."""
    if given and raw:
        raise OptionError("--raw uses no chat template: leave out --template-arg")
    named: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError("--template-arg takes NAME=VALUE: there is no = in it")
        try:
            refuse_bad_name(name)
        except OptionError as error:
            raise OptionError(f"--template-arg: {error}") from None
        if name in named:
            raise OptionError(f"--template-arg {name} is given twice")
        named[name] = _template_value(name, value)
    return named


def _template_value(name: str, text: str) -> object:
    """true, false, none, a number or JSON; what is none of these is text."""
    text = argument_text(text, f"the value of --template-arg {name}")
    words: dict[str, object] = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    if NUMBER.fullmatch(text):
        return json.loads(text)
    if not text.startswith(("{", "[", '"')):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = error.pos + 1
    except (ValueError, RecursionError):
        raise OptionError(f"--template-arg {name}: its JSON is nested too deeply, or a number is too long") from None
    raise OptionError(f"--template-arg {name} begins like JSON and is none: look at character {where}")


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
