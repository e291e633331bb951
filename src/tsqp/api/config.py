"""What a run can be asked to be: one field for each option, with its help. The command line makes its flags of these.

A field's metadata: ``help``; ``variable``, whether ``TSQP_NAME`` gives it too; ``former``, the variable's older name;
``heading``, where ``--help`` shows it; ``size``, for bytes that may be written as 512MB. Which values and which
combinations are refused: ``rules.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tsqp.config.dtype import AskedDtype, PrivateKVDtype, WireDtype
from tsqp.config.partition import PartitionName as PartitionName
from tsqp.config.protection import ProtectionName as ProtectionName

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

DEALER = "dealer="
ObliviousWay = Literal["auto", "scan", "oram"]


def _option(
    heading: str,
    default: Any,
    text: str,
    *,
    variable: bool = True,
    former: str | None = None,
    size: bool = False,
) -> Any:
    metadata = {"heading": heading, "help": text, "variable": variable, "former": former, "size": size}
    return field(default=default, metadata=metadata)


def _documented(config: type[T]) -> type[T]:
    """The same class, whose docstring has the help of each field."""
    helps = (f"``{one.name}``: {one.metadata['help']}" for one in fields(config) if one.metadata)
    config.__doc__ = "\n\n".join([str(config.__doc__), *helps])
    return config


_model = partial(_option, "model")
_connection = partial(_option, "connection")
_privacy = partial(_option, "privacy")
_pads = partial(_option, "pads")


@_documented
@dataclass(frozen=True)
class WorkerConfig:
    """How the worker is reached, or started beside this process. Keys are files, see ``tsqp keys``."""

    address: str | tuple[str, ...] | None = _connection(
        None,
        "A running worker: shm:///path, ipc:///path, tcp://host:port, or cuda:///path for tensors in device memory (no "
        "isolation: open only); without one, one is started. Each further one is a standby, for when those before it "
        "are lost or cheat. Or all workers of a roster, in masked and verified: roster:///path for a file, "
        "roster+tcp://host:port for a front.",
        former="LLAMA_IPC_PATH",
    )
    device: str = _model(
        "cpu",
        "Where the worker computes: cpu, cuda[:n], or several CUDA devices with commas between.",
        former="LLAMA_GPU_DEVICE",
    )
    compiled: bool = _model(
        False, "The worker compiles its products by torch.compile; needs a C++ compiler.", variable=False
    )
    spare: bool = _connection(
        False,
        "Keep a second worker started here and loaded, which takes over from a lost one at once; a worker's "
        "memory is taken twice.",
        variable=False,
    )
    deadline_s: float = _connection(300.0, "The longest wait for one reply of the worker, in seconds.", variable=False)
    patience_s: float = _connection(
        60.0,
        "How long a lost worker is waited for, in seconds, before all requests end; 0: the first loss ends the run.",
    )
    arena_bytes: int | None = _connection(
        None,
        "The most memory shared with a worker or dealer over shm: bytes, or such as 512M or 2G; half of what limits "
        "leave, at most 4GiB, when not given. Over cuda: device memory, 256MiB when not given.",
        size=True,
    )
    user: str | None = _connection(
        None, "The user that a worker at an shm or cuda address runs as, by name or number; this one when not given."
    )
    key: Path | None = _connection(None, "This side's secret key file, for a worker or a dealer by tcp.")
    server_key: Path | None = _connection(None, "The worker's public key file, for tcp; a roster names the keys.")
    insecure_plain_tcp: bool = _connection(
        False, "Allow tcp off loopback without keys: anyone on the path can read it.", variable=False
    )

    def __post_init__(self) -> None:
        if self.address is not None and not isinstance(self.address, str):
            several = tuple(self.address)  # one alone is the same, however it was given
            object.__setattr__(self, "address", several if len(several) > 1 else next(iter(several), None))

    @property
    def addresses(self) -> tuple[str, ...]:
        """All of them, in turn; none where a worker is started here."""
        if self.address is None:
            return ()
        return (self.address,) if isinstance(self.address, str) else self.address


@_documented
@dataclass(frozen=True)
class GuardConfig:
    """How products are checked and where pads come from. Everything but the first three is for ``masked`` only."""

    checks: int = _privacy(2, "Check vectors: a cheat passes with probability 2^(-31·checks) (masked and verified).")
    model_digest: str | None = _privacy(
        None, "Refuse any model but the one with this digest (tsqp model info --digest) (masked and verified)."
    )
    compiled_step: bool = _privacy(
        True,
        "A decode step over shm is one compiled loop; off, it is a call of Python for each product, to the same bits "
        "(masked and verified).",
        variable=False,
    )
    pad_source: str = _pads(
        "tee",
        "Who multiplies pads by the weights: tee (this process) or dealer=ADDR (a second worker, of a party that does "
        "not collude with the first one's, or a roster of several); masked only, like all about pads.",
    )
    dealer_key: Path | None = _pads(
        None, "The public key file of the dealer, or of the front of a roster of dealers, for tcp (masked only)."
    )
    dealer_no_separation: bool = _pads(
        False,
        "Allow a dealer over shm, ipc or plain loopback: for tests, whoever runs the worker may read it (masked only).",
    )
    pads_ahead: int = _pads(256, "Tokens whose pads are kept ready, as memory allows (masked only).")
    pad_memory: int = _pads(
        1 << 30, "The most memory for pads: bytes, or such as 512MB or 2GB (masked only).", size=True
    )
    pads_empty: Literal["wait", "refuse"] = _pads(
        "wait", "When pads are missing: make them and go on, or refuse the call (masked only)."
    )
    warm_pads: bool = _pads(False, "Fill the pool before the first call (masked only).")

    @property
    def dealer(self) -> str | None:
        """The dealer's address."""
        return dealer_address(self.pad_source)


@_documented
@dataclass(frozen=True)
class ComputeConfig:
    """What is computed where, and in which numbers."""

    partition: PartitionName = _model("linear", "Which operators run on the worker.")
    dtype: AskedDtype = _model(
        "auto",
        "What both sides compute in, at open and local; auto: float32 for weights stored so, else bfloat16; int8: "
        "linear layers, the rest in bfloat16.",
        former="LLAMA_DTYPE",
    )
    wire_dtype: WireDtype | None = _model(
        None, "What crosses the line, at open; what this side computes in when not given. int8 halves the traffic."
    )
    kv_dtype: PrivateKVDtype | None = _model(
        None,
        "What this side keeps keys and values as, in masked and verified; when not given, float32 for weights stored "
        "so, else bfloat16; int8 takes half of bfloat16. "
        "Elsewhere they are in what is computed in.",
    )
    kv_memory: int | None = _model(
        None,
        "The most memory for keys and values on this side: bytes, or such as 512MB or 2GB; half of what is available "
        "when not given.",
        size=True,
    )
    prefill_chunk: int = _model(2048, "The most prompt tokens that cross the layers together.", variable=False)
    micro_batches: int | None = _model(
        None,
        "Parts of a chunk that cross the layers in turn: one is computed here, the others there. When not given, 1 "
        "beside a worker on the CPU; beside one on a GPU what the first long prompts show to be fastest.",
        variable=False,
    )
    compiled_kernels: bool = _model(
        True, "Element-wise operators and attention compiled by numba, for bfloat16 and float32."
    )
    kernel_cache: str = _model(
        "auto", "Where compiled kernels are kept: a directory, off, or auto (the user's cache, none in a TEE)."
    )
    oblivious: bool | None = _privacy(
        None,
        "Look tokens up and choose them so that whoever watches which memory is touched learns no token; when not "
        "given, where a TEE is detected. Tokenizer and grammars are as ever. Not for open, whose worker sees more.",
    )
    oblivious_embedding: ObliviousWay = _privacy(
        "auto",
        "How an oblivious look-up finds its row: scan goes over the whole table; oram over paths of a random tree, far "
        "faster, but it takes minutes to build and the memory of two tables; auto is scan until a tree is built beside "
        "the work, where there is memory for one; on SEV-SNP it stays scan.",
    )
    lock_memory: bool = _privacy(
        False, "Keep the memory of this process out of swap (mlockall); refused where the system does not allow it."
    )
    threads: int | None = _model(None, "CPU threads of each side; all cores when not given.")
    lora: tuple[str, ...] = _model(
        (),
        "A LoRA adapter, [NAME=]PATH: a directory as PEFT saves it, which stays on this side; NAME is that of the "
        "directory when not given. May be given again.",
    )

    def __post_init__(self) -> None:
        given: str | Iterable[str] = self.lora
        object.__setattr__(self, "lora", (given,) if isinstance(given, str) else tuple(given))


@_documented
@dataclass(frozen=True)
class RunConfig:
    """A model and all that it is run with: what ``LLM`` takes, as one value."""

    model: str = _model(
        "default",
        "A Hugging Face directory, a .gguf file, a Hub id, default, or synthetic:NAME.",
        former="LLAMA_MODEL_PATH",
    )
    protection: ProtectionName = _privacy(
        "masked",
        "What the worker may learn and do: masked (it sees noise and cannot cheat), verified (it sees all and cannot "
        "cheat), open (it sees everything and is believed) or local (there is none).",
    )
    worker: WorkerConfig = WorkerConfig()
    guard: GuardConfig = GuardConfig()
    compute: ComputeConfig = ComputeConfig()


def is_roster(address: str) -> bool:
    """Whether a worker's address as it is typed is that of a roster, or was to be one."""
    return address.startswith(("roster:", "roster+"))


def dealer_address(pad_source: str) -> str | None:
    """The address in ``dealer=ADDR``, None for any other source."""
    return pad_source.removeprefix(DEALER) if pad_source.startswith(DEALER) else None
