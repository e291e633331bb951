"""An example of everything that the tables of ``tsqp.api.rules`` refuse: as fields, and as flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.rules import CONFLICTS, UNUSED, Conflict, Unused
from tsqp.wire.transport.keys import create_keys

AWAY = "tcp://192.0.2.1:7000"  # documentation's network: nobody is there
DEALT = f"dealer={AWAY}"
ROSTER = f"roster+{AWAY}"
TWO = "cuda:0,cuda:1"


class Refused(NamedTuple):
    """A run that is refused, the flags that ask for it, and the fields that the error names."""

    run: RunConfig
    flags: tuple[str, ...]
    fields: tuple[str, ...]


# What no option may be, and how the command line says it; None where its parser refuses that before the rules do.
BAD_VALUES: list[tuple[str, Any, str | None]] = [
    ("protection", "hidden", None),
    *(("worker.deadline_s", value, str(value)) for value in (0.0, -1.0, float("inf"), float("nan"))),
    *(("worker.patience_s", value, str(value)) for value in (-1.0, float("inf"), float("nan"))),
    ("worker.arena_bytes", 1000, "1000"),
    ("worker.arena_bytes", 1 << 41, "2048GiB"),
    ("guard.checks", 0, "0"),
    ("guard.checks", 17, "17"),
    ("guard.model_digest", "abc", "abc"),
    ("guard.pad_source", "heaven", "heaven"),
    ("guard.pad_source", "dealer=", "dealer="),
    ("guard.pads_ahead", -1, "-1"),
    ("guard.pad_memory", -1, None),
    ("guard.pads_empty", "hope", None),
    ("compute.partition", "diagonal", None),
    ("compute.dtype", "int4", None),
    ("compute.wire_dtype", "int4", None),
    ("compute.kv_dtype", "int4", None),
    ("compute.kv_memory", 0, "0"),
    ("compute.oblivious_embedding", "hope", None),
    ("compute.prefill_chunk", 0, "0"),
    ("compute.micro_batches", 0, "0"),
    ("compute.threads", 0, "0"),
    ("compute.threads", -1, "-1"),
]

# A value of each option that asks for something, and the words that follow its flag.
SAMPLES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "worker.address": ("ipc:///x", ("ipc:///x",)),
    "worker.device": ("cuda:1", ("cuda:1",)),
    "worker.compiled": (True, ()),
    "worker.spare": (True, ()),
    "worker.deadline_s": (5.0, ("5",)),
    "worker.patience_s": (5.0, ("5",)),
    "worker.arena_bytes": (1 << 28, ("256MiB",)),
    "worker.user": ("root", ("root",)),
    "worker.key": (Path("x"), ("x",)),
    "worker.server_key": (Path("x"), ("x",)),
    "worker.insecure_plain_tcp": (True, ()),
    "guard.checks": (3, ("3",)),
    "guard.model_digest": ("0" * 64, ("0" * 64,)),
    "guard.compiled_step": (False, ()),
    "guard.pad_source": ("dealer=ipc:///x", ("dealer=ipc:///x",)),
    "guard.dealer_key": (Path("x"), ("x",)),
    "guard.dealer_no_separation": (True, ()),
    "guard.pads_ahead": (5, ("5",)),
    "guard.pad_memory": (10**9, ("1GB",)),
    "guard.pads_empty": ("refuse", ("refuse",)),
    "guard.warm_pads": (True, ()),
    "compute.partition": ("op", ("op",)),
    "compute.dtype": ("bfloat16", ("bfloat16",)),
    "compute.wire_dtype": ("float32", ("float32",)),
    "compute.kv_dtype": ("float32", ("float32",)),
    "compute.kv_memory": (1 << 30, ("1GiB",)),
    "compute.compiled_kernels": (False, ()),
    "compute.oblivious": (True, ()),
}

# Runs in which each rule of UNUSED applies, by what the rule says.
OCCASIONS: dict[str, list[tuple[RunConfig, tuple[str, ...]]]] = {
    "protection {mode} uses no worker": [(RunConfig(protection="local"), ())],
    "protection {mode} keeps keys and values in what it computes in": [
        (RunConfig(protection="open"), ()),
        (RunConfig(protection="local"), ()),
    ],
    "at partition layer the worker keeps keys and values": [
        (RunConfig(protection="open", compute=ComputeConfig("layer")), ("--partition", "layer"))
    ],
    "the worker of protection {mode} sees more than an oblivious look-up hides": [(RunConfig(protection="open"), ())],
    "protection {mode} checks no products": [(RunConfig(protection="open"), ())],
    "protection {mode} has no pads": [(RunConfig(protection="verified"), ())],
    "pads come from this process, not from a dealer": [(RunConfig(), ())],
    "the worker's address is given, and it has a device of its own": [
        (RunConfig(protection="open", worker=WorkerConfig("ipc:///x")), ("--worker", "ipc:///x"))
    ],
    "there is no worker with a tcp address": [
        (RunConfig(protection="open"), ()),
        (RunConfig(protection="open", worker=WorkerConfig("ipc:///x")), ("--worker", "ipc:///x")),
    ],
    "there is no worker with an shm or cuda address": [
        (RunConfig(protection="open"), ()),
        (RunConfig(protection="open", worker=WorkerConfig("ipc:///x")), ("--worker", "ipc:///x")),
    ],
    "neither worker nor dealer is reached by shm or cuda": [
        (RunConfig(protection="open", worker=WorkerConfig("ipc:///x")), ("--worker", "ipc:///x"))
    ],
    "a roster names the workers' keys": [(RunConfig(worker=WorkerConfig(ROSTER)), ("--worker", ROSTER))],
    "each worker of a roster has a key, or is on this machine": [
        (RunConfig(worker=WorkerConfig(ROSTER)), ("--worker", ROSTER)),
        (RunConfig("default", "verified", WorkerConfig("roster:///x")), ("--worker", "roster:///x")),
    ],
    "there is neither worker nor dealer with a tcp address": [
        (RunConfig(protection="open"), ()),
        (RunConfig(protection="open", worker=WorkerConfig("ipc:///x")), ("--worker", "ipc:///x")),
    ],
}
PRIVATE: list[tuple[RunConfig, tuple[str, ...]]] = [(RunConfig(protection="verified"), ()), (RunConfig(), ())]


def changed(run: RunConfig, name: str, value: object) -> RunConfig:
    """The same run with one option changed, which is named as errors name it."""
    section, _, field = name.rpartition(".")
    part: Any = getattr(run, section) if section else run
    changes: dict[str, Any] = {field: value}
    return cast(RunConfig, replace(run, **{section: replace(part, **changes)}) if section else replace(part, **changes))


def unused() -> list[tuple[Unused, Refused]]:
    """Each rule of UNUSED with each of its fields."""
    return [
        (rule, Refused(changed(run, name, SAMPLES[name][0]), (*flags, *words(name)), (name,)))
        for rule in UNUSED
        for run, flags in (PRIVATE if rule.private else OCCASIONS[rule.why])
        for name in rule.fields
    ]


def words(name: str) -> tuple[str, ...]:
    """The flag of an option, and what follows it."""
    names = {"address": "worker", "compiled": "compile", "deadline_s": "deadline", "server_key": "worker-key"}
    names |= {"patience_s": "worker-patience", "user": "worker-user"}
    names |= {"compiled_kernels": "no-compiled-kernels", "compiled_step": "no-compiled-step", "arena_bytes": "arena"}
    last = name.rpartition(".")[2]
    return (f"--{names.get(last, last.replace('_', '-'))}", *SAMPLES[name][1])


def conflicts(directory: Path) -> list[tuple[Conflict, Refused]]:
    """Each rule of CONFLICTS, with key files in ``directory``."""
    me, other = create_keys(directory, "me"), create_keys(directory, "other")
    mine, theirs = me.secret, other.public
    key, to_dealer = ("--key", str(mine)), ("--pad-source", DEALT)
    dealt = WorkerConfig(key=mine)
    examples: list[tuple[RunConfig, tuple[str, ...]]] = [
        (RunConfig(worker=WorkerConfig("cuda:///x")), ("--worker", "cuda:///x")),
        (RunConfig(guard=GuardConfig(pad_source="dealer=cuda:///x")), ("--pad-source", "dealer=cuda:///x")),
        (RunConfig(worker=WorkerConfig(spare=True, patience_s=0)), ("--spare", "--worker-patience", "0")),
        (
            RunConfig(protection="open", compute=ComputeConfig(partition="layer", lora=("/nowhere/adapter",))),
            ("--partition", "layer", "--lora", "/nowhere/adapter"),
        ),
        (RunConfig(compute=ComputeConfig(oblivious_embedding="oram")), ("--oblivious-embedding", "oram")),
        (RunConfig(worker=WorkerConfig(("ipc:///x", "ipc:///x"))), ("--worker", "ipc:///x", "--worker", "ipc:///x")),
        (RunConfig(worker=WorkerConfig((ROSTER, AWAY))), ("--worker", ROSTER, "--worker", AWAY)),
        (RunConfig(protection="open", worker=WorkerConfig("roster:///x")), ("--worker", "roster:///x")),
        (RunConfig(protection="verified", worker=WorkerConfig(ROSTER)), ("--worker", ROSTER)),
        (RunConfig(guard=GuardConfig(warm_pads=True, pads_ahead=0)), ("--warm-pads", "--pads-ahead", "0")),
        (
            RunConfig(protection="open", worker=WorkerConfig(AWAY, server_key=theirs)),
            ("--worker", AWAY, "--worker-key", str(theirs)),
        ),
        (RunConfig(protection="open", worker=WorkerConfig(AWAY, key=mine)), ("--worker", AWAY, *key)),
        (
            RunConfig(guard=GuardConfig(pad_source=DEALT, dealer_key=theirs)),
            (*to_dealer, "--dealer-key", str(theirs)),
        ),
        (
            RunConfig(
                worker=WorkerConfig(AWAY, key=mine),
                guard=GuardConfig(pad_source="dealer=ipc:///x", dealer_key=theirs),
            ),
            ("--worker", AWAY, *key, "--pad-source", "dealer=ipc:///x", "--dealer-key", str(theirs)),
        ),
        (
            RunConfig(
                worker=dealt,
                guard=GuardConfig(pad_source=DEALT, dealer_key=theirs, dealer_no_separation=True),
            ),
            (*key, *to_dealer, "--dealer-key", str(theirs), "--dealer-no-separation"),
        ),
        (RunConfig(guard=GuardConfig(pad_source=DEALT)), to_dealer),
        (RunConfig(guard=GuardConfig(pad_source="dealer=ipc:///x")), ("--pad-source", "dealer=ipc:///x")),
        (
            RunConfig(
                worker=WorkerConfig("ipc:///x"),
                guard=GuardConfig(pad_source="dealer=ipc:///x", dealer_no_separation=True),
            ),
            ("--worker", "ipc:///x", "--pad-source", "dealer=ipc:///x", "--dealer-no-separation"),
        ),
        (
            RunConfig(
                worker=WorkerConfig("tcp://192.0.2.2:7000", key=mine, server_key=theirs),
                guard=GuardConfig(pad_source=DEALT, dealer_key=theirs),
            ),
            (
                *("--worker", "tcp://192.0.2.2:7000", *key, "--worker-key", str(theirs)),
                *(*to_dealer, "--dealer-key", str(theirs)),
            ),
        ),
        (
            RunConfig(protection="open", worker=WorkerConfig(device=TWO), compute=ComputeConfig(partition="layer")),
            ("--partition", "layer", "--device", TWO),
        ),
        (
            RunConfig(protection="open", worker=WorkerConfig(device=TWO, compiled=True)),
            ("--device", TWO, "--compile"),
        ),
    ]
    return [(rule, Refused(run, flags, rule.fields)) for rule, (run, flags) in zip(CONFLICTS, examples, strict=True)]
