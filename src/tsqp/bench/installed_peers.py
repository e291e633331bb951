"""The peers of a benchmark that goes on without them: those that are installed and can have the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.bench.device import first_device
from tsqp.bench.gguf_copy import MATRICES
from tsqp.bench.llama_cpp import LlamaCppPeer
from tsqp.bench.peer import TransformersPeer, is_installed, say_missing
from tsqp.bench.workload import Workload
from tsqp.checkpoint import locate
from tsqp.config.dtype import PlainDtype
from tsqp.cores import cores
from tsqp.errors import UnsupportedModel

LLAMA_CPP_DTYPES: tuple[PlainDtype, ...] = ("bfloat16", "int8")


def transformers_peer(run: RunConfig, stack: ExitStack, console: Console) -> TransformersPeer | None:
    """transformers in bfloat16, on the worker's device; it is closed with ``stack``."""
    if not is_installed("transformers"):
        say_missing("transformers", console)
        return None
    device, threads = first_device(run.worker.device), run.compute.threads or cores()
    with _left_out_if_unsupported("transformers", console):
        return stack.enter_context(TransformersPeer(locate(run.model), "bfloat16", device, threads))
    return None


def llama_cpp_peers(
    run: RunConfig, work: Workload, slots: int, stack: ExitStack, console: Console
) -> list[LlamaCppPeer]:
    """llama.cpp's servers in bfloat16 and with 8-bit weights, which are closed with ``stack``.

    Its package is for the CPU, so there are none where the worker is elsewhere.
    """
    found = list[LlamaCppPeer]()
    if run.worker.device != "cpu":
        return found
    if not is_installed("llama.cpp"):
        say_missing("llama.cpp", console)
        return found
    model, threads = locate(run.model), run.compute.threads or cores()
    for dtype in LLAMA_CPP_DTYPES:
        with _left_out_if_unsupported(f"llama.cpp {MATRICES[dtype].name}", console):
            found.append(stack.enter_context(LlamaCppPeer(model, dtype, work, threads, console, slots=slots)))
    return found


@contextmanager
def _left_out_if_unsupported(name: str, console: Console) -> Iterator[None]:
    try:
        yield
    except UnsupportedModel as error:
        console.print(f"without {name}: {error}", highlight=False, markup=False, soft_wrap=True)
