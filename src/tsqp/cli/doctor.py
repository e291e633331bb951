"""``tsqp doctor``: what this machine offers, what it isolates, and what would fail."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsqp.api.config import GuardConfig
from tsqp.api.memory_limits import available_bytes
from tsqp.api.pads import pool_bytes
from tsqp.arith.product import BlockedKernel
from tsqp.arith.self_test import pick_kernel
from tsqp.checkpoint.default import default_directory
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.cores import cores
from tsqp.errors import DeviceError
from tsqp.model.accelerator import TorchCuda, described, why_none
from tsqp.tee.detection import detect_tee
from tsqp.tee.hardening import hardening_state
from tsqp.tee.memory import swap_state
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.transport import connect, listen, new_ipc_address, new_shm_address
from tsqp.wire.transport.cuda.driver import uuid_text
from tsqp.wire.transport.cuda.libcuda import LibCuda
from tsqp.wire.transport.runtime_dir import runtime_directory

State = Literal["ok", "note", "broken"]
VERSIONS = ("tsqp", "torch", "pyzmq", "msgspec", "safetensors", "gguf", "tokenizers")
PROBE_ARENA_BYTES = 1 << 20
PROBE_DEADLINE_S = 5.0
STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "broken": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at."""

    all: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return all(finding.state != "broken" for finding in self.all)

    def as_dict(self) -> dict[str, object]:
        """The object of ``--json``."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.all]}


def examine() -> Diagnosis:
    """Look at everything. Never raises for what it finds."""
    looks: dict[str, Callable[[], tuple[State, str]]] = {
        "TEE": _tee,
        "isolation": lambda: ("note", hardening_state()),
        "swapped memory": _swap,
        "accelerator": _accelerator,
        "runtime directory": lambda: ("ok", f"{runtime_directory()}, for this user alone"),
        "transport mem": lambda: _transport("mem:doctor"),
        "transport shm": lambda: _transport(new_shm_address()),
        "transport ipc": lambda: _transport(new_ipc_address()),
        "transport tcp": lambda: _transport("tcp://127.0.0.1:0"),
        "transport cuda": _device_memory,
        "default model": _default_model,
        "processor": _processor,
        "exact int8 products": _exact_products,
        "memory for pads": _pad_memory,
        "versions": lambda: ("ok", ", ".join(f"{name} {version(name)}" for name in VERSIONS)),
        "platform": lambda: ("ok", f"Python {platform.python_version()}, {platform.platform()}"),
    }
    return Diagnosis(tuple(_finding(what, look) for what, look in looks.items()))


def print_findings(findings: Diagnosis) -> None:
    """One row for each finding."""
    table = Table(show_header=False, box=None)
    for finding in findings.all:
        table.add_row(finding.what, Text(finding.state, STYLES[finding.state]), Text(finding.detail))  # no markup
    Console().print(table)


def _finding(what: str, look: Callable[[], tuple[State, str]]) -> Finding:
    """What ``look`` sees; that it failed is a finding as well, whatever it raised."""
    try:
        return Finding(what, *look())
    except Exception as error:
        return Finding(what, "broken", " ".join(str(error).split()) or type(error).__name__)


def _tee() -> tuple[State, str]:
    tee = detect_tee()
    if tee is None:
        return "note", "none: process isolation only, for demonstration; the host can read everything"
    return "ok", tee


def _swap() -> tuple[State, str]:
    safe, line = swap_state()
    return "ok" if safe else "note", line


def _accelerator() -> tuple[State, str]:
    cuda = TorchCuda()
    reason = why_none(cuda)
    if reason is not None:
        return "note", f"workers compute on the CPU: {reason}"
    return "ok", described(cuda)


def _transport(address: str) -> tuple[State, str]:
    """Really connects and moves one message."""
    arena_bytes = PROBE_ARENA_BYTES if address.startswith("shm:") else None
    with closing(listen(address)) as listener, closing(connect(listener.address, arena_bytes=arena_bytes)) as channel:
        channel.send(Frames(b"?", (memoryview(b"probe"),)))
        arrival = listener.receive(PROBE_DEADLINE_S)
        if not isinstance(arrival, Arrival) or bytes(arrival.frames.tensors[0]) != b"probe":
            return "broken", "a message did not arrive"
        return "ok", "a message arrived"


def _device_memory() -> tuple[State, str]:
    """Nothing is moved: no process can open the handle of its own memory."""
    label = "no isolation, so for --protection open alone"
    try:
        with closing(LibCuda(0)) as driver:
            return "note", f"{label}; clients would use {uuid_text(driver.uuid)}; no message was tried"
    except DeviceError as error:
        return "note", f"{label}; not here: {error}"


def _default_model() -> tuple[State, str]:
    directory = default_directory()
    if directory is None:
        return "note", "not fetched yet: tsqp model fetch"
    return "ok", str(directory)


def _processor() -> tuple[State, str]:
    count = cores()
    flags = _cpu_flags()
    fast = [name for name in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni") if name in flags]
    return "ok", f"{count} cores; {', '.join(fast) if fast else 'no low-precision instructions'}"


def _exact_products() -> tuple[State, str]:
    """What the private modes multiply with."""
    if isinstance(pick_kernel(torch.device("cpu")), BlockedKernel):
        return "note", "no fast kernel is exact on this processor: private modes multiply in float32, and are slow"
    return "ok", "the fast kernel is exact on this processor: private modes use it"


def _pad_memory() -> tuple[State, str]:
    """What ``masked`` keeps ready by default, at the 1B shape."""
    allowed, ahead = GuardConfig().pad_memory, GuardConfig().pads_ahead
    free, wanted = available_bytes(), pool_bytes(SHAPES["llama-3.2-1b"], ahead)
    state: State = "ok" if free is None or free > allowed else "note"
    known = "an unknown amount" if free is None else f"{free / 1e9:.1f} GB"
    return state, (
        f"{known} available; --pad-memory allows {allowed / 1e9:.1f} GB, of which {ahead} tokens ahead take "
        f"{wanted / 1e9:.2f} GB at the Llama-3.2-1B shape"
    )


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.split())
