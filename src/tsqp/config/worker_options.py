"""The worker's options: one parser for ``python -m tsqp.untrusted`` and for ``tsqp worker``, which starts that."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsqp.config.dtype import COMPUTE_DTYPES
from tsqp.config.shard import Shard
from tsqp.errors import OptionError

# Read by ``tsqp worker``, the first that is set; a flag wins over them.
VARIABLES = {
    "--model": ("TSQP_MODEL", "LLAMA_MODEL_PATH"),
    "--listen": ("TSQP_LISTEN", "LLAMA_IPC_PATH"),
    "--device": ("TSQP_DEVICE", "LLAMA_GPU_DEVICE"),
    "--dtype": ("TSQP_DTYPE", "LLAMA_DTYPE"),
    "--threads": ("TSQP_THREADS",),
    "--key": ("TSQP_KEY",),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise OptionError(message)

    def option(self, flag: str, text: str, *short: str, **more: Any) -> None:
        """One option; its help ends with its variables and its default."""
        notes = [f"env: {', '.join(VARIABLES[flag])}"] if flag in VARIABLES else []
        notes += [f"default: {more['default']}"] if more.get("default") else []
        self.add_argument(flag, *short, help=" ".join([text, *(f"[{note}]" for note in notes)]), **more)


def parse_worker_options(arguments: Sequence[str]) -> argparse.Namespace:
    """``shard`` is a Shard or None. Raises OptionError."""
    about = "Serve the linear algebra of one model to trusted sides, until Ctrl-C."
    parser = _Parser(prog="tsqp worker", description=about, allow_abbrev=False)
    parser.option("--model", "directory, .gguf file, Hub id, default, or synthetic:NAME", "-m", default="default")
    parser.option(
        "--listen",
        "shm:///path, ipc:///path, tcp://host:port (port 0: any), or cuda:///path (no isolation: device memory of the "
        "client, for open only); a fresh shm address when not given",
        metavar="ADDR",
    )
    parser.option(
        "--device",
        "where it computes: cpu, cuda[:n], or several CUDA devices with commas between",
        default="cpu",
        type=device_name,
    )
    parser.option(
        "--dtype",
        "what it computes in, prepared before it listens; int8: its linear layers, everything else in bfloat16; field: "
        "exact products for the private modes; a client that asks for another waits for it",
        default="auto",
        choices=("auto", *COMPUTE_DTYPES),
    )
    parser.option(
        "--shard",
        "hold these layers alone, and of their linear groups these output features, for the private modes: 0..17, "
        "or 0..17/0..1of2; the LM head is the layer after the last; all of the model when not given",
        metavar="SHARD",
    )
    parser.option("--compile", "compile the products by torch.compile; needs a C++ compiler", action="store_true")
    parser.option(
        "--no-compiled-calls",
        "answer each call in Python, also those over shm that only repeat: to the same bits, slower",
        action="store_true",
    )
    parser.option("--threads", "CPU threads; all cores when not given", type=int)
    parser.option("--key", "this worker's secret CURVE key, for tcp", type=Path, metavar="FILE")
    parser.option(
        "--allow",
        "public CURVE key of a trusted side that may connect; may be given again",
        type=Path,
        metavar="FILE",
        action="append",
    )
    parser.option(
        "--allow-user",
        "user of this machine, by name or number, who may connect over shm or cuda beside this one; may be given again",
        metavar="USER",
        action="append",
        default=[],
    )
    parser.option("--insecure-plain-tcp", "allow tcp off loopback without keys", action="store_true")
    parser.option("--exit-with-stdin", "stop at the end of standard input", action="store_true")
    parser.option("--debug", "a traceback with every error", action="store_true")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        raise OptionError(f"--threads must be at least 1, not {options.threads}")
    if options.shard is not None:
        _check_shard(options)
    if options.compile and options.dtype == "field":
        raise OptionError("--compile plays no part in --dtype field: leave it out")
    if (options.listen or "").startswith("cuda:"):
        if options.device == "cpu":
            raise OptionError("--listen cuda:// is for tensors on a GPU: say which one by --device cuda[:n]")
        if "," in options.device:
            raise OptionError("--listen cuda:// is for tensors on one GPU: name one device, or listen at shm://")
        if options.dtype == "field":
            raise OptionError("--dtype field is for the private modes, and --listen cuda:// gives no isolation")
    return options


def _check_shard(options: argparse.Namespace) -> None:
    """Make a Shard of the option, which says the dtype too. Raises OptionError."""
    options.shard = Shard.parse(options.shard)
    if options.dtype not in ("auto", "field"):
        raise OptionError(f"--shard is for the private modes: use --dtype field, not {options.dtype}")
    if options.compile:
        raise OptionError("--compile plays no part with --shard: leave it out")
    if (options.listen or "").startswith("cuda:"):
        raise OptionError("--shard is for the private modes, and --listen cuda:// gives no isolation")
    options.dtype = "field"


def arguments_of(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> list[str]:
    """The flags that the variables in ``environment`` stand for, before ``arguments``, which win over them.

    A key is for tcp: elsewhere its variable, which may be there for another command, is ignored. Raises OptionError.
    """
    given = {flag: next(filter(None, map(environment.get, names)), None) for flag, names in VARIABLES.items()}
    chosen = [f"{flag}={value}" for flag, value in given.items() if value is not None and flag != "--key"]
    if given["--key"] and (parse_worker_options([*chosen, *arguments]).listen or "").startswith("tcp:"):
        chosen.append(f"--key={given['--key']}")
    return [*chosen, *arguments]


def device_name(text: str) -> str:
    """A bare number, as LLAMA_GPU_DEVICE had it, is a CUDA device."""
    return f"cuda:{text}" if text.isdecimal() else text
