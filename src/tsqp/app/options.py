"""Every option of the command line and its environment names. Flags win over TSQP_*, which win over LLAMA_*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token

from tsqp.spec.dtype import DtypeName

PartitionName = Literal["op", "batched", "linear"]
ProtectionName = Literal["open", "local"]


def _device(_: Any, tokens: Sequence[Token]) -> str:
    """A bare number, as LLAMA_GPU_DEVICE had it, is a CUDA device."""
    value = tokens[0].value
    return f"cuda:{value}" if value.isdecimal() else value


Model = Annotated[
    str,
    Parameter(
        name=["--model", "-m"],
        env_var=["TSQP_MODEL", "LLAMA_MODEL_PATH"],
        help="A Hugging Face directory, a .gguf file, a Hub id, default, or synthetic:NAME.",
    ),
]
Device = Annotated[
    str,
    Parameter(
        env_var=["TSQP_DEVICE", "LLAMA_GPU_DEVICE"],
        converter=_device,
        help="Where the worker computes: cpu or cuda[:n].",
    ),
]
Dtype = Annotated[
    DtypeName,
    Parameter(env_var=["TSQP_DTYPE", "LLAMA_DTYPE"], help="What both sides compute in."),
]
Threads = Annotated[
    int | None, Parameter(env_var="TSQP_THREADS", help="CPU threads of each side; all cores when not given.")
]
PlainTcp = Annotated[bool, Parameter(help="Allow tcp off loopback without keys: anyone on the path can read it.")]


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    """The model, how it is split, and how the worker is reached."""

    model: Model = "default"
    protection: Annotated[
        ProtectionName,
        Parameter(env_var="TSQP_PROTECTION", help="What the worker may learn: open (everything) or local (no worker)."),
    ] = "open"
    partition: Annotated[
        PartitionName, Parameter(env_var="TSQP_PARTITION", help="Which operators run on the worker.")
    ] = "linear"
    worker: Annotated[
        str | None,
        Parameter(
            env_var=["TSQP_WORKER", "LLAMA_IPC_PATH"],
            help="Address of a running worker, ipc:///path or tcp://host:port; one is started here when not given.",
        ),
    ] = None
    device: Device = "cpu"
    dtype: Dtype = "bfloat16"
    wire_dtype: Annotated[
        DtypeName | None,
        Parameter(env_var="TSQP_WIRE_DTYPE", help="What crosses the line; the same as --dtype when not given."),
    ] = None
    prefill_chunk: Annotated[int, Parameter(help="The most prompt tokens that cross the layers together.")] = 2048
    threads: Threads = None
    deadline: Annotated[float, Parameter(help="The longest wait for one reply of the worker, in seconds.")] = 300.0
    key: Annotated[Path | None, Parameter(env_var="TSQP_KEY", help="This side's secret key file, for tcp.")] = None
    worker_key: Annotated[
        Path | None, Parameter(env_var="TSQP_WORKER_KEY", help="The worker's public key file, for tcp.")
    ] = None
    insecure_plain_tcp: PlainTcp = False


@Parameter(name="*")
@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when the answer ends."""

    max_tokens: Annotated[int, Parameter(name=["--max-tokens", "-n"], help="The most new tokens.")] = 256
    temperature: Annotated[float, Parameter(help="0 always takes the most likely token.")] = 0.0
    top_k: Annotated[int, Parameter(help="Choose among the k most likely tokens; 0 for all.")] = 0
    top_p: Annotated[float, Parameter(help="Choose among the most likely tokens that make up this probability.")] = 1.0
    min_p: Annotated[float, Parameter(help="Leave out tokens less likely than this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, Parameter(help="Above 1 makes tokens already in the text less likely.")] = 1.0
    seed: Annotated[int | None, Parameter(help="Makes sampling repeatable.")] = None
    stop: Annotated[tuple[str, ...], Parameter(help="A string that ends the answer; may be given again.")] = ()
    ignore_eos: Annotated[bool, Parameter(help="Go on after the model's own end token.")] = False


@Parameter(name="*")
@dataclass(frozen=True)
class OutputOptions:
    """What is printed besides the answer."""

    stats: Annotated[bool, Parameter(help="Print where time and bytes went.")] = False
    json: Annotated[bool, Parameter(help="Print one JSON object as the last line instead of streaming text.")] = False


@Parameter(name="*")
@dataclass(frozen=True)
class WorkerOptions:
    """A worker that runs on its own."""

    model: Model = "default"
    listen: Annotated[
        str | None,
        Parameter(
            env_var=["TSQP_LISTEN", "LLAMA_IPC_PATH"],
            help="ipc:///path or tcp://host:port (port 0: the system chooses); a fresh ipc address when not given.",
        ),
    ] = None
    device: Device = "cpu"
    dtype: Annotated[
        DtypeName, Parameter(env_var=["TSQP_DTYPE", "LLAMA_DTYPE"], help="What the worker computes in.")
    ] = "bfloat16"
    threads: Threads = None
    key: Annotated[Path | None, Parameter(env_var="TSQP_KEY", help="The worker's secret key file, for tcp.")] = None
    allow: Annotated[
        tuple[Path, ...], Parameter(help="Public key file of a trusted side that may connect; may be given again.")
    ] = ()
    insecure_plain_tcp: PlainTcp = False
    debug: Annotated[bool, Parameter(show=False)] = False
