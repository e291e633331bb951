"""Every option of the command line and its environment names. Flags win over TSQP_*, which win over LLAMA_*.

A flag that would play no part in the run is refused; a variable of that kind is ignored: it may be set for other runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Argument, ArgumentCollection, Parameter, Token

from tsqp.api import guard_config as guard_options
from tsqp.api.guard_config import DEALER, GuardConfig
from tsqp.cli.help_groups import CONNECTION, MODEL, OUTPUT, PRIVACY, SAMPLING
from tsqp.config.dtype import PLAIN_DTYPES, AskedDtype, AskedWorkerDtype, WireDtype
from tsqp.config.partition import PARTITIONS
from tsqp.config.protection import PROTECTIONS, Protection
from tsqp.errors import OptionError

PartitionName = Literal["op", "batched", "linear", "layer"]
ProtectionName = Literal["masked", "verified", "open", "local"]

# Options that play a part with a tcp worker only, with any worker, with a dealer, with pads, with any check.
OF_TCP = ("--key", "--worker-key", "--insecure-plain-tcp")
OF_A_WORKER = ("--worker", "--partition", "--device", "--compile", "--wire-dtype", "--deadline", *OF_TCP)
OF_A_DEALER = tuple(f"--{name.replace('_', '-')}" for name in guard_options.OF_A_DEALER)
OF_PADS = tuple(f"--{name.replace('_', '-')}" for name in guard_options.OF_PADS)
OF_CHECKS = ("--checks", "--model-digest", *OF_PADS)


def settle(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse the flags that would play no part and forget the variables that would not; cyclopts calls it.

    Raises OptionError that names the flag.
    """
    named = {argument.name: argument for argument in arguments}
    if "--protection" not in named or "--worker" not in named:
        return  # not a command that runs a model
    chosen = _chosen(named["--protection"])
    protection = PROTECTIONS.get(chosen)
    if protection is None:
        return  # an unknown one, which is refused when it is parsed
    if not protection.uses_worker:
        _leave_out(f"protection {protection.name} uses no worker", named, (*OF_A_WORKER, *OF_CHECKS))
        return
    if protection.checked:
        _settle_private(protection, named)
    else:
        _leave_out(f"protection {protection.name} checks no products", named, OF_CHECKS)
    worker = named["--worker"]
    if _by_flag(named["--device"]) and not _by_flag(worker):
        worker.tokens.clear()  # the flag asks for a worker that is started here
    if worker.tokens:
        _leave_out("the worker's address is given, and it has a device of its own", named, ("--device", "--compile"))
    if not _value(worker).startswith("tcp://"):
        to_dealer = _value(named["--pad-source"]).startswith(f"{DEALER}tcp://")
        _leave_out("there is no worker with a tcp address", named, OF_TCP[1:] if to_dealer else OF_TCP)


def _settle_private(protection: Protection, named: Mapping[str, Argument]) -> None:
    """The same for what a private mode decides itself, and for pads. A default gives way to no flag: it is refused."""
    by_default = not named["--protection"].tokens
    hint = ", or add --protection open: then the worker sees everything" if by_default else ""
    partition = named["--partition"]
    if _value(partition) in PARTITIONS and _value(partition) not in protection.partitions:
        if by_default or _by_flag(partition):
            own = " or ".join(protection.partitions)
            name = f"protection {protection.name}{', the default,' if by_default else ''}"
            raise OptionError(f"{name} cannot use partition {_value(partition)}: use {own}{hint}")
        partition.tokens.clear()
    dtype, kernels = named["--dtype"], named["--compiled-kernels"]
    other = _value(dtype) in PLAIN_DTYPES and _value(dtype) != "float32"  # an unknown one is refused when it is parsed
    numbers = ["--wire-dtype", *(["--dtype"] if other else [])]
    _leave_out(f"protection {protection.name} has numbers of its own", named, numbers, hint)
    _leave_out("the private modes do not use torch.compile", named, ["--compile"], hint)
    if any(token.keyword == "--no-compiled-kernels" for token in kernels.tokens if token.source == "cli"):
        raise OptionError(f"protection {protection.name} needs its loops: leave out --no-compiled-kernels{hint}")
    kernels.tokens.clear()
    if not protection.masked:
        _leave_out(f"protection {protection.name} has no pads", named, OF_PADS)
    elif not _value(named["--pad-source"]).startswith(DEALER):
        _leave_out("pads come from this process, not from a dealer", named, OF_A_DEALER)


def _leave_out(why: str, named: Mapping[str, Argument], names: Sequence[str], hint: str = "") -> None:
    flags = [name for name in names if _by_flag(named[name])]
    if flags:
        raise OptionError(f"{why}: leave out {', '.join(flags)}{hint}")
    for name in names:
        named[name].tokens.clear()


def _by_flag(argument: Argument) -> bool:
    return any(token.source == "cli" for token in argument.tokens)


def _value(argument: Argument) -> str:
    """What was given, empty when it is left to the default."""
    return argument.tokens[-1].value if argument.tokens else ""


def _chosen(argument: Argument) -> str:
    """What was given, or the command's default."""
    return _value(argument) or str(argument.field_info.default)


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
    AskedDtype,
    Parameter(
        env_var=["TSQP_DTYPE", "LLAMA_DTYPE"],
        help="What both sides compute in, at open and local; int8: the worker's linear layers, the rest in bfloat16.",
    ),
]
Threads = Annotated[
    int | None, Parameter(env_var="TSQP_THREADS", help="CPU threads of each side; all cores when not given.")
]
Compile = Annotated[bool, Parameter(help="The worker compiles its products by torch.compile; needs a C++ compiler.")]
PlainTcp = Annotated[bool, Parameter(help="Allow tcp off loopback without keys: anyone on the path can read it.")]


PROTECTION_HELP = (
    "What the worker may learn and do: masked (it sees noise and cannot cheat), verified (it sees all and cannot "
    "cheat), open (it sees everything and is believed) or local (there is none)."
)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class RunOptions:
    """The model, how it is split, and how the worker is reached."""

    model: Model = "default"
    protection: Annotated[
        ProtectionName,
        Parameter(env_var="TSQP_PROTECTION", group=PRIVACY, help=PROTECTION_HELP),
    ] = "masked"
    guard: GuardConfig = GuardConfig()
    partition: Annotated[
        PartitionName, Parameter(env_var="TSQP_PARTITION", help="Which operators run on the worker.")
    ] = "linear"
    worker: Annotated[
        str | None,
        Parameter(
            env_var=["TSQP_WORKER", "LLAMA_IPC_PATH"],
            group=CONNECTION,
            help="A running worker: shm:///path, ipc:///path or tcp://host:port; without one, one is started.",
        ),
    ] = None
    device: Device = "cpu"
    dtype: Dtype = "auto"
    wire_dtype: Annotated[
        WireDtype | None,
        Parameter(
            env_var="TSQP_WIRE_DTYPE",
            help="What crosses the line; what this side computes in when not given. int8 halves the traffic.",
        ),
    ] = None
    compile: Compile = False
    prefill_chunk: Annotated[int, Parameter(help="The most prompt tokens that cross the layers together.")] = 2048
    micro_batches: Annotated[
        int, Parameter(help="Parts of a chunk that cross the layers in turn: one is computed here, the others there.")
    ] = 1
    compiled_kernels: Annotated[
        bool,
        Parameter(
            negative="--no-compiled-kernels",
            env_var="TSQP_COMPILED_KERNELS",
            help="Element-wise operators compiled by numba, for bfloat16 and float32.",
        ),
    ] = True
    kernel_cache: Annotated[
        str,
        Parameter(
            env_var="TSQP_KERNEL_CACHE",
            help="Where compiled kernels are kept: a directory, off, or auto (the user's cache, none in a TEE).",
        ),
    ] = "auto"
    threads: Threads = None
    deadline: Annotated[
        float, Parameter(group=CONNECTION, help="The longest wait for one reply of the worker, in seconds.")
    ] = 300.0
    key: Annotated[
        Path | None, Parameter(env_var="TSQP_KEY", group=CONNECTION, help="This side's secret key file, for tcp.")
    ] = None
    worker_key: Annotated[
        Path | None,
        Parameter(env_var="TSQP_WORKER_KEY", group=CONNECTION, help="The worker's public key file, for tcp."),
    ] = None
    insecure_plain_tcp: Annotated[PlainTcp, Parameter(group=CONNECTION)] = False


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class BenchRunOptions(RunOptions):
    """The same for a benchmark, which measures the split itself unless it is told otherwise."""

    protection: Annotated[
        ProtectionName,
        Parameter(env_var="TSQP_PROTECTION", group=PRIVACY, help=f"{PROTECTION_HELP} A benchmark's default is open."),
    ] = "open"


@Parameter(name="*", group=SAMPLING)
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
    stop_token_ids: Annotated[
        tuple[int, ...],
        Parameter(name="--stop-token", help="The id of a token that ends the answer; may be given again."),
    ] = ()
    ignore_eos: Annotated[bool, Parameter(help="Go on after the model's own end token.")] = False


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class OutputOptions:
    """What is printed besides the answer."""

    stats: Annotated[bool, Parameter(help="Print where time and bytes went.")] = False
    trace: Annotated[
        Path | None, Parameter(help="Write what happened when to this file, for https://ui.perfetto.dev.")
    ] = None
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
            help="shm:///path, ipc:///path or tcp://host:port (port 0: any); a fresh shm address when not given.",
        ),
    ] = None
    device: Device = "cpu"
    dtype: Annotated[
        AskedWorkerDtype,
        Parameter(
            env_var=["TSQP_DTYPE", "LLAMA_DTYPE"],
            help="What the worker computes in, prepared before it listens; int8: its linear layers, everything else in "
            "bfloat16; field: exact products for the private modes. A client that asks for another waits for it.",
        ),
    ] = "auto"
    compile: Compile = False
    threads: Threads = None
    key: Annotated[Path | None, Parameter(env_var="TSQP_KEY", help="The worker's secret key file, for tcp.")] = None
    allow: Annotated[
        tuple[Path, ...], Parameter(help="Public key file of a trusted side that may connect; may be given again.")
    ] = ()
    insecure_plain_tcp: PlainTcp = False
    debug: Annotated[bool, Parameter(show=False)] = False
