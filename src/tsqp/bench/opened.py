"""A model that is open for a benchmark: its mode is stated, and what the handshake has shown."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.api.describe import handshake_line, mode_lines
from tsqp.api.llm import LLM
from tsqp.api.plan import Plan
from tsqp.config.protection import PROTECTIONS
from tsqp.progress_bar import progress_bar


def opened(run: RunConfig, console: Console) -> LLM:
    """The model as ``run`` asks for it. Raises every error of ``LLM``."""

    def announce(plan: Plan) -> None:
        for line, style in mode_lines(plan):
            console.print(line, style=style, soft_wrap=True, markup=False)

    with progress_bar(console) as progress:
        llm = LLM.of(run, announce=announce, progress=progress)
    line = handshake_line(llm)
    if line is not None:
        console.print(line, style="dim", soft_wrap=True, markup=False)
    return llm


def plain(run: RunConfig) -> RunConfig:
    """The same model, threads and device, at ``open`` with a worker of its own and nothing else asked for."""
    device, threads = run.worker.device, run.compute.threads
    bare = RunConfig(run.model, "open")
    return replace(bare, worker=replace(bare.worker, device=device), compute=replace(bare.compute, threads=threads))


def in_bfloat16(run: RunConfig) -> RunConfig:
    """The same in bfloat16 however its weights are stored; a private mode keeps its keys and values in it, no more."""
    if PROTECTIONS[run.protection].checked:
        return replace(run, compute=replace(run.compute, kv_dtype="bfloat16"))
    return replace(run, compute=replace(run.compute, dtype="bfloat16"))
