"""``tsqp audit``: run a prompt in each mode, and attack what reached the worker."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from tsqp.cli.arguments import JsonLine
from tsqp.cli.options import Device, Model, Threads
from tsqp.cli.prompt_text import AfterDashes, PromptArgument, PromptFile, prompt_text, warn_of_argument
from tsqp.config.dtype import AskedDtype
from tsqp.config.protection import PROTECTIONS
from tsqp.cores import cores
from tsqp.errors import OptionError
from tsqp.progress import Progress, counted, unseen

if TYPE_CHECKING:
    from rich.console import Console

    from tsqp.audit.capture import Captured
    from tsqp.audit.report import ModeReport

AuditedName = Literal["open", "verified", "masked"]
MODES: tuple[AuditedName, ...] = ("open", "verified", "masked")
ANSWER_TOKENS = 8  # so that decode steps are among what is captured

audit_app = App(name="audit", help="Show what a worker learns from a prompt: capture what reaches it, and attack that.")


@audit_app.default
def audit(
    prompt: PromptArgument = None,
    /,
    *,
    after_dashes: AfterDashes = False,
    prompt_file: PromptFile = None,
    protection: Annotated[
        AuditedName | None,
        Parameter(help="Audit this mode only; all three when not given, whatever TSQP_PROTECTION says."),
    ] = None,
    model: Model = "default",
    device: Device = "cpu",
    dtype: Annotated[
        AskedDtype, Parameter(help="What open computes in; verified and masked compute in integers of their own.")
    ] = "auto",
    threads: Threads = None,
    lora: Annotated[
        str | None, Parameter(help="A LoRA adapter that answers, [NAME=]PATH; attacks know the model without it.")
    ] = None,
    json_output: JsonLine = False,
) -> None:
    """Run a prompt in each protection mode and attack what reached the worker.

    Prints the text that two attacks recover, beside what they make of fresh noise, and the p-value of a test of
    uniformity: near 0 for anything but noise. Every mode gets a worker of its own, and masked a dealer of pads,
    whose view is attacked too.

    Parameters
    ----------
    prompt
        The user's text, of at most 200 tokens, or - to read it from standard input. It is printed where an attack
        recovers it.
    """
    from rich.console import Console

    from tsqp.progress_bar import progress_bar

    if dtype != "auto" and protection not in (None, "open"):
        raise OptionError(f"protection {protection} computes in integers of its own: leave out --dtype")
    text = prompt_text(prompt, prompt_file, after_dashes)
    count = cores() if threads is None else threads
    notes = Console(stderr=True)
    modes = MODES if protection is None else (protection,)
    warn_of_argument(prompt, modes[-1], notes)
    with progress_bar(notes, silent=json_output) as progress:
        reports = run_audit(
            text,
            modes,
            model=model,
            device=device,
            dtype=dtype,
            threads=count,
            lora=lora,
            notes=notes,
            progress=progress,
        )
    if json_output:
        found = [report.as_dict() for report in reports]
        sys.stdout.write(json.dumps(found[0] if protection is not None else {"modes": found}) + "\n")
        return
    from tsqp.audit.report import print_report

    print_report(reports, Console())


def run_audit(
    text: str,
    modes: tuple[AuditedName, ...],
    *,
    model: str,
    device: str,
    dtype: AskedDtype,
    threads: int,
    notes: Console,
    lora: str | None = None,
    progress: Progress = unseen,
) -> list[ModeReport]:
    """Capture every mode, then attack every capture. ``lora``: the adapter that answers, [NAME=]PATH.

    Raises PromptError before anything is started.
    """
    from tsqp.audit.prompt import audit_prompt
    from tsqp.checkpoint import locate, open_checkpoint
    from tsqp.trusted.text.tokenizer import Tokenizer

    model = locate(model)
    checkpoint = open_checkpoint(model)
    tokenizer = Tokenizer(checkpoint.text_format())
    prompt = audit_prompt(tokenizer, text)
    notes.print("running " + ", ".join(modes), style="dim")
    captured = [
        capture_run(
            prompt.ids,
            mode,
            model=model,
            device=device,
            dtype=dtype,
            threads=threads,
            lora=lora,
            progress=_of(mode, progress),
        )
        for mode in modes
    ]
    notes.print("attacking what was captured", style="dim")

    from tsqp.audit.report import Attacker

    progress("attacking what was captured")
    attacker = Attacker(checkpoint, tokenizer, prompt)
    pairs = list(zip(modes, captured, strict=True))
    return [attacker.report(*pair) for pair in counted(pairs, "attacking what was captured", progress)]


def _of(mode: str, progress: Progress) -> Progress:
    """The same, which says the mode first."""
    return lambda what, done=0, total=0: progress(f"{mode}: {what}", done, total)


def capture_run(
    ids: tuple[int, ...],
    mode: AuditedName,
    *,
    model: str,
    device: str,
    dtype: AskedDtype,
    threads: int,
    lora: str | None = None,
    progress: Progress = unseen,
) -> Captured:
    """All that was sent while a prompt was answered; ``masked`` takes its pads from a dealer that is started here."""
    from tsqp.api.adapters import named_paths
    from tsqp.api.config import DEALER, ComputeConfig, GuardConfig, WorkerConfig
    from tsqp.api.llm import LLM
    from tsqp.audit.capture import Capture, Captured
    from tsqp.launch.local import LocalWorker
    from tsqp.trusted.engine.sampling_params import SamplingParams

    protection = PROTECTIONS[mode]
    with ExitStack() as stack:
        captured, guard = Captured(Capture(), None), None
        if protection.masked:
            own = stack.enter_context(LocalWorker(model, device="cpu", dtype="field", threads=threads))
            progress("waiting for the dealer of pads")
            captured = Captured(Capture(), Capture(), own.wait_ready())
            guard = GuardConfig(pad_source=f"{DEALER}{captured.dealer_address}", dealer_no_separation=True)
        llm = stack.enter_context(
            LLM(
                model,
                protection=mode,
                worker=WorkerConfig(device=device),
                guard=guard,
                compute=ComputeConfig(
                    dtype="auto" if protection.checked else dtype, threads=threads, lora=() if lora is None else (lora,)
                ),
                connect=captured.connect,
                progress=progress,
            )
        )
        progress("answering")
        adapter = None if lora is None else next(iter(named_paths((lora,))))
        llm.generate(list(ids), SamplingParams(max_tokens=ANSWER_TOKENS), lora=adapter)
    return captured
