"""The options of commands. Flags win over TSQP_*, which win over LLAMA_*.

A flag that would play no part in the run is refused; a variable of that kind is ignored: it may be set for other runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, get_args, get_origin

from cyclopts import UNSET, App, Argument, ArgumentCollection, Parameter

from tsqp.api.config import RunConfig
from tsqp.api.rules import UNUSED, Choices, leave_out, names_of, unused
from tsqp.cli.flags import flag_of, flags_of, option_type
from tsqp.cli.help_groups import OUTPUT
from tsqp.config.protection import PROTECTIONS
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling_params import SamplingParams

OPEN_INSTEAD = ", or add --protection open: then the worker sees everything"


def settle(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse the flags that would play no part and forget the variables that would not; cyclopts calls it.

    Raises OptionError that names the flag.
    """
    named = {name: argument for argument in arguments for name in (argument.names or ())}
    if {"--model", "--models"} <= named.keys():
        if _by_flag(named["--model"]):
            raise OptionError("several models are measured: use --models in place of --model")
        named["--model"].tokens.clear()
    if "--protection" not in named or "--worker" not in named:
        return  # not a command that runs a model
    by_field = {name: named[flag_of(name)] for part in SECTIONS for name in names_of(part)}
    chosen = _chosen(named["--protection"])
    if chosen not in PROTECTIONS:
        return  # it is refused when it is parsed
    by_default = not named["--protection"].tokens
    worker = by_field["worker.address"]
    if PROTECTIONS[chosen].uses_worker and _by_flag(by_field["worker.device"]) and not _by_flag(worker):
        worker.tokens.clear()  # the flag asks for a worker that is started here
    workers = tuple(token.value for token in worker.tokens)
    pad_source, partition = (_text(by_field[name]) for name in ("guard.pad_source", "compute.partition"))
    choices = Choices.of(chosen, workers, pad_source, partition)
    for rule in UNUSED:
        given = [(name, _value(by_field[name])) for name in rule.fields if _counts(by_field[name])]
        refused = unused(rule, choices, given)
        # A default does not decide what a user meant by a variable that says where operators run.
        loud = [name for name in refused if _by_flag(by_field[name]) or (by_default and name == "compute.partition")]
        if loud:
            raise leave_out(rule, choices, tuple(loud), OPEN_INSTEAD if by_default and rule.private else "")
        for name in refused:
            by_field[name].tokens.clear()


SECTIONS: tuple[Literal["worker", "guard", "compute"], ...] = ("worker", "guard", "compute")


def _counts(argument: Argument) -> bool:
    """Whether a value was given; a flag's that is none of those that exist is refused when it is parsed."""
    names = get_args(argument.hint) if get_origin(argument.hint) is Literal else ()
    return bool(argument.tokens) and not (names and _by_flag(argument) and _value(argument) not in names)


def _by_flag(argument: Argument) -> bool:
    return any(token.source == "cli" for token in argument.tokens)


def _value(argument: Argument) -> object:
    """What was given, as text, but for flags without a value."""
    token = argument.tokens[-1]
    return token.value if token.implicit_value is UNSET else token.implicit_value


def _text(argument: Argument) -> str:
    """What was given, empty when it is left to the default."""
    return argument.tokens[-1].value if argument.tokens else ""


def _chosen(argument: Argument) -> str:
    """What was given, or the command's default."""
    return _text(argument) or str(argument.field_info.default)


if TYPE_CHECKING:
    RunOptions: TypeAlias = RunConfig
    BenchRunOptions: TypeAlias = RunConfig
    SamplingOptions: TypeAlias = SamplingParams
    Model: TypeAlias = str
    Device: TypeAlias = str
    Threads: TypeAlias = int | None
    MicroBatches: TypeAlias = int | None
else:
    RunOptions = flags_of(RunConfig)
    BenchRunOptions = flags_of(RunConfig, protection="open")  # a benchmark measures the split itself
    SamplingOptions = flags_of(SamplingParams)
    Model, Device, Threads, MicroBatches = (
        option_type("", "model"),
        option_type("worker", "device"),
        option_type("compute", "threads"),
        option_type("compute", "micro_batches"),
    )


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class OutputOptions:
    """What is printed besides the answer."""

    stats: Annotated[bool, Parameter(help="Print where time and bytes went.")] = False
    trace: Annotated[
        Path | None,
        Parameter(help="Write what happened when to this file, for https://ui.perfetto.dev. It makes decoding slower."),
    ] = None
    json: Annotated[bool, Parameter(help="Print one JSON object as the last line instead of streaming text.")] = False
