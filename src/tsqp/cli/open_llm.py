"""From the options of a command to a model that is open, its mode stated first."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tsqp.api.guard_config import GuardConfig
from tsqp.cli.options import RunOptions
from tsqp.config.protection import PROTECTIONS
from tsqp.errors import OptionError

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.api.plan import Plan
    from tsqp.wire.transport.keys import ClientKeys


def open_llm(options: RunOptions) -> LLM:
    """The model as the options ask for it, the mode stated before anything starts. Raises every error of ``LLM``."""
    from rich.console import Console

    from tsqp.api.llm import LLM
    from tsqp.api.pads import pads_bar

    guard = replace(options.guard, own_key=options.key if options.guard.dealer_key is not None else None)
    with pads_bar(Console(stderr=True)) as progress:
        return LLM(
            options.model,
            protection=options.protection,
            guard=guard if PROTECTIONS[options.protection].checked else None,
            partition=options.partition,
            worker=options.worker,
            device=options.device,
            dtype=options.dtype,
            wire_dtype=options.wire_dtype,
            prefill_chunk=options.prefill_chunk,
            micro_batches=options.micro_batches,
            compiled_kernels=options.compiled_kernels,
            kernel_cache=options.kernel_cache,
            compiled_worker=options.compile,
            threads=len(os.sched_getaffinity(0)) if options.threads is None else options.threads,
            deadline_s=options.deadline,
            security=_client_keys(options),
            insecure_plain_tcp=options.insecure_plain_tcp,
            announce=partial(_state_mode, guard),
            pads_progress=progress,
        )


def _state_mode(guard: GuardConfig, plan: Plan) -> None:
    """One line on standard error: what the worker may learn; one more where a dealer could collude with it."""
    from rich.console import Console

    protection, console = plan.protection, Console(stderr=True)
    line = f"protection {protection.name}: the worker sees {protection.worker_sees}"
    warn = protection.uses_worker and not protection.checked
    console.print(f"warning: {line}" if warn else line, style="yellow" if warn else "dim", soft_wrap=True)
    if guard.dealer is not None and guard.dealer_no_separation:
        line = f"warning: no separation: whoever runs the worker may read the line to the dealer {guard.dealer}"
        console.print(line, style="yellow", soft_wrap=True, markup=False)


def _client_keys(options: RunOptions) -> ClientKeys | None:
    """The keys for a tcp worker; this side's own may be for a dealer alone. Raises OptionError, AddressError."""
    if options.worker_key is None and (options.key is None or options.guard.dealer_key is not None):
        return None
    if options.key is None or options.worker_key is None:
        raise OptionError("--key and --worker-key go together: this side's secret key, and the worker's public one")
    from tsqp.wire.transport.keys import ClientKeys, load_public, load_secret

    return ClientKeys(load_secret(options.key), load_public(options.worker_key))
