"""The form that an answer must have, from the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tsqp.cli.arguments import read_text
from tsqp.cli.help_groups import SAMPLING
from tsqp.cli.prompt_text import argument_text
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True)
class FormOptions:
    """What the whole answer must be."""

    json_schema: Annotated[
        Path | None, Parameter(help="Answer with JSON by the schema in this file, which may be {} for any JSON.")
    ] = None
    regex: Annotated[str | None, Parameter(help="Answer with a text that this regular expression matches.")] = None
    grammar: Annotated[Path | None, Parameter(help="Answer with a text of the Lark grammar in this file.")] = None


def with_form(sampling: SamplingParams, form: FormOptions) -> SamplingParams:
    """The same sampling with the form that was asked for, read once, if one was. Raises OptionError, InputError."""
    given = [name for name in ("json_schema", "regex", "grammar") if getattr(form, name) is not None]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    if not given:
        return sampling
    if len(given) > 1:
        raise OptionError(f"{' and '.join(flags)} exclude each other: an answer has one form")
    if sampling.ignore_eos:
        raise OptionError(f"--ignore-eos and {flags[0]} exclude each other: an answer that has its form ends")
    if form.json_schema is not None:
        params = StructuredOutputsParams(json=read_text(form.json_schema, "--json-schema"))
    elif form.grammar is not None:
        params = StructuredOutputsParams(grammar=read_text(form.grammar, "--grammar"))
    else:
        params = StructuredOutputsParams(regex=argument_text(form.regex or "", "--regex"))
    from tsqp.trusted.text.grammar import check_form  # here, since it takes a tenth of a second

    check_form(params)
    return replace(sampling, structured_outputs=params)
