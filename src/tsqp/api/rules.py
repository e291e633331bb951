"""What is refused, and why: every rule about options, once. ``check`` holds a run against them before anything starts.

Three tables: ``VALUES``, what one option may be; ``UNUSED``, options that would play no part beside others and are
therefore refused by name; ``CONFLICTS``, options that cannot be what they are together. What depends on the model is
refused where the model is known: ``pads.py`` and ``private_links.py``.

Covers: a dealer with the worker's address or key, and a line to a dealer that the worker's host can read, are refused
before anything is started (tests/api/test_rules.py); no option that is refused is ignored instead, and no flag weakens
the protection (tests/cli/test_rules.py, tests/cli/test_options.py). Does not cover: two addresses and two keys of one
party. Assumes: the dealer's public key came from the party that runs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig, dealer_address
from tsqp.config.dtype import INT8_HEAD_DIMS, PRIVATE_KV_DTYPES, WIRE_DTYPES, AskedDtype, KVDtype
from tsqp.config.partition import PARTITIONS
from tsqp.config.protection import PROTECTIONS, Protection
from tsqp.errors import OptionError

if TYPE_CHECKING:
    from tsqp.wire.transport.address import Address

MAX_CHECKS = 16
ARENA_BYTES = 1 << 20, 1 << 40  # the least and the most


class Value(NamedTuple):
    """What one option may be: ``holds`` says whether a value is, ``must`` says it in words."""

    must: str
    holds: Callable[[Any], bool]


class Unused(NamedTuple):
    """``fields`` play no part where ``applies``; a value that is ``fine`` asks for nothing and passes.

    ``private``: a private mode refuses what ``open`` would do.
    """

    why: str
    fields: tuple[str, ...]
    applies: Callable[[Choices], bool]
    fine: tuple[object, ...] = ()
    private: bool = False


class Conflict(NamedTuple):
    """A run for which ``broken`` holds is refused; ``fields`` are those that ``says`` names."""

    says: str
    fields: tuple[str, ...]
    broken: Callable[[RunConfig], bool]


class Choices(NamedTuple):
    """What the parts that other options play depend on."""

    protection: Protection
    workers: tuple[str, ...]  # addresses
    dealer: str | None  # an address
    partition: str | None  # where the mode leaves a choice

    @classmethod
    def of(cls, protection: str, workers: tuple[str, ...], pad_source: str, partition: str) -> Choices:
        """``protection`` is one that exists; a dealer plays a part where there are pads alone."""
        chosen = PROTECTIONS[protection]
        return cls(
            chosen,
            workers,
            dealer_address(pad_source) if chosen.masked else None,
            partition if chosen.uses_worker and not chosen.checked else None,
        )

    @property
    def split(self) -> bool:
        return self.protection.uses_worker

    def worker_over(self, scheme: str) -> bool:
        """Whether a worker has an address of this scheme."""
        return any(address.startswith(scheme) for address in self.workers)

    def over(self, scheme: str) -> bool:
        """Whether a worker or the dealer has an address of this scheme."""
        return self.worker_over(scheme) or (self.dealer or "").startswith(scheme)


def one_of(names: Collection[str]) -> Value:
    """One of these names."""
    return Value(", ".join(names), lambda value: value in names)


def at_least(least: int, unit: str) -> Value:
    """A whole number with a bound."""
    return Value(f"{least} or more {unit}", lambda value: value >= least)


VALUES = {
    "protection": one_of(PROTECTIONS),
    "worker.patience_s": Value("0 or more seconds", lambda seconds: 0 <= seconds < math.inf),
    "worker.deadline_s": Value("a positive number of seconds", lambda seconds: 0 < seconds < math.inf),
    "worker.arena_bytes": Value(
        f"{ARENA_BYTES[0]} to {ARENA_BYTES[1]} bytes",
        lambda size: size is None or ARENA_BYTES[0] <= size <= ARENA_BYTES[1],
    ),
    "guard.checks": Value(f"1 to {MAX_CHECKS}", lambda checks: 1 <= checks <= MAX_CHECKS),
    "guard.model_digest": Value(
        "64 hex digits, which tsqp model info --digest shows",
        lambda digest: digest is None or re.fullmatch("[0-9a-fA-F]{64}", digest) is not None,
    ),
    "guard.pad_source": Value("tee or dealer=ADDR", lambda source: source == "tee" or bool(dealer_address(source))),
    "guard.pads_ahead": at_least(0, "tokens"),
    "guard.pad_memory": at_least(0, "bytes"),
    "guard.pads_empty": one_of(("wait", "refuse")),
    "compute.partition": one_of(PARTITIONS),
    "compute.dtype": one_of(get_args(AskedDtype)),
    "compute.wire_dtype": Value(", ".join(WIRE_DTYPES), lambda dtype: dtype is None or dtype in WIRE_DTYPES),
    "compute.kv_dtype": Value(", ".join(PRIVATE_KV_DTYPES), lambda dtype: dtype is None or dtype in PRIVATE_KV_DTYPES),
    "compute.kv_memory": Value("1 or more bytes", lambda size: size is None or size >= 1),
    "compute.prefill_chunk": at_least(1, "tokens"),
    "compute.micro_batches": at_least(1, "parts"),
    "compute.threads": Value("1 or more", lambda threads: threads is None or threads >= 1),
}


def names_of(section: Literal["worker", "guard", "compute"]) -> tuple[str, ...]:
    """Every field of a section, as errors name it."""
    config = {"worker": WorkerConfig, "guard": GuardConfig, "compute": ComputeConfig}[section]
    return tuple(f"{section}.{field.name}" for field in fields(config))


OF_CHECKS = ("guard.checks", "guard.model_digest", "guard.compiled_step")
OF_A_DEALER = ("guard.dealer_key", "guard.dealer_no_separation")
OF_PADS = tuple(name for name in names_of("guard") if name not in OF_CHECKS)


def _checked(of: Choices) -> bool:
    return of.protection.checked


OWN_NUMBERS = "protection {mode} has numbers of its own"

UNUSED = (
    Unused(
        "protection {mode} uses no worker",
        (*names_of("worker"), "compute.partition", "compute.wire_dtype", *names_of("guard")),
        lambda of: not of.split,
    ),
    Unused(
        "protection {mode} keeps keys and values in what it computes in",
        ("compute.kv_dtype",),
        lambda of: not _checked(of),
    ),
    Unused(
        "at partition layer the worker keeps keys and values",
        ("compute.kv_memory",),
        lambda of: of.partition == "layer",
    ),
    Unused("protection {mode} checks no products", names_of("guard"), lambda of: of.split and not _checked(of)),
    Unused("protection {mode} uses partition linear", ("compute.partition",), _checked, ("linear",), private=True),
    Unused(OWN_NUMBERS, ("compute.dtype",), _checked, ("auto", "float32"), private=True),
    Unused(OWN_NUMBERS, ("compute.wire_dtype",), _checked, private=True),
    Unused(
        "protection {mode} needs its compiled loops", ("compute.compiled_kernels",), _checked, (True,), private=True
    ),
    Unused("the private modes do not use torch.compile", ("worker.compiled",), _checked, private=True),
    Unused("protection {mode} has no pads", OF_PADS, lambda of: _checked(of) and not of.protection.masked),
    Unused(
        "pads come from this process, not from a dealer",
        OF_A_DEALER,
        lambda of: of.protection.masked and of.dealer is None,
    ),
    Unused(
        "the worker's address is given, and it has a device of its own",
        ("worker.device", "worker.compiled", "worker.spare"),
        lambda of: of.split and bool(of.workers),
    ),
    Unused(
        "there is no worker with a tcp address",
        ("worker.server_key", "worker.insecure_plain_tcp"),
        lambda of: of.split and not of.worker_over("tcp://"),
    ),
    Unused(
        "there is neither worker nor dealer with a tcp address",
        ("worker.key",),
        lambda of: of.split and not of.over("tcp://"),
    ),
    Unused(
        "there is no worker with an shm address",
        ("worker.user",),
        lambda of: of.split and not of.worker_over("shm://"),
    ),
    Unused(
        "neither worker nor dealer is reached by shm",
        ("worker.arena_bytes",),
        lambda of: of.split and bool(of.workers) and not of.over("shm://"),
    ),
)


CONFLICTS = (
    Conflict(
        "at a worker.patience_s of 0 nothing takes over from a lost worker: leave out worker.spare",
        ("worker.patience_s", "worker.spare"),
        lambda run: run.worker.spare and not run.worker.patience_s,
    ),
    Conflict(
        "worker.address names a worker twice: each further one is a standby for the others",
        ("worker.address",),
        lambda run: len(set(run.worker.addresses)) < len(run.worker.addresses),
    ),
    Conflict(
        "guard.warm_pads fills a pool that 0 of guard.pads_ahead keeps empty: leave out one of them",
        ("guard.warm_pads", "guard.pads_ahead"),
        lambda run: run.guard.warm_pads and not run.guard.pads_ahead,
    ),
    Conflict(
        "worker.server_key is the worker's public key: give this side's secret one too, by worker.key",
        ("worker.server_key", "worker.key"),
        lambda run: run.worker.server_key is not None and run.worker.key is None,
    ),
    Conflict(
        "worker.key is this side's secret key: give the worker's public one too, by worker.server_key",
        ("worker.key", "worker.server_key"),
        lambda run: run.worker.key is not None and run.worker.server_key is None and run.guard.dealer_key is None,
    ),
    Conflict(
        "guard.dealer_key is the dealer's public key: give this side's secret one too, by worker.key",
        ("guard.dealer_key", "worker.key"),
        lambda run: run.guard.dealer_key is not None and run.worker.key is None,
    ),
    Conflict(
        "the dealer is not reached by tcp: leave out guard.dealer_key",
        ("guard.dealer_key",),
        lambda run: run.guard.dealer_key is not None and _dealer(run).transport != "tcp",
    ),
    Conflict(
        "the dealer is reached by tcp with keys: leave out guard.dealer_no_separation",
        ("guard.dealer_no_separation",),
        lambda run: run.guard.dealer_key is not None and run.guard.dealer_no_separation,
    ),
    Conflict(
        "the dealer is not on this host: give its public key by guard.dealer_key",
        ("guard.dealer_key",),
        lambda run: _open_line(run) and _dealer(run).transport == "tcp" and not _dealer(run).is_loopback,
    ),
    Conflict(
        "whoever runs the worker may read the line to the dealer, and then everything: use tcp with guard.dealer_key, "
        "or guard.dealer_no_separation for a test",
        ("guard.dealer_key", "guard.dealer_no_separation"),
        lambda run: _open_line(run) and not run.guard.dealer_no_separation,
    ),
    Conflict(
        "guard.pad_source is the worker itself: a dealer must be another party's",
        ("guard.pad_source",),
        lambda run: (
            run.guard.dealer is not None
            and any(_same_place(_dealer(run), _address(one)) for one in run.worker.addresses)
        ),
    ),
    Conflict(
        "guard.dealer_key is the worker's key: a dealer must be another party's",
        ("guard.dealer_key",),
        lambda run: run.guard.dealer_key is not None and _same_key(run),
    ),
)


def check(run: RunConfig) -> None:
    """Raises OptionError that names what is wrong; AddressError for what is no address or no key file."""
    given = {name: value for name, value, default in _values(run) if value != default}
    for name, may_be in VALUES.items():
        if name in given and not may_be.holds(given[name]):
            raise OptionError(f"{name} must be {may_be.must}, not {given[name]}", fields=(name,))
    choices = Choices.of(run.protection, run.worker.addresses, run.guard.pad_source, run.compute.partition)
    for rule in UNUSED:
        refused = unused(rule, choices, given.items())
        if refused:
            raise leave_out(rule, choices, refused)
    for conflict in CONFLICTS:
        if conflict.broken(run):
            raise OptionError(conflict.says, fields=conflict.fields)


def check_heads(kept: KVDtype, head_dim: int) -> None:
    """Raises OptionError for a model whose heads a cache of 8-bit integers cannot hold."""
    if kept == "int8" and head_dim not in INT8_HEAD_DIMS:
        raise OptionError(
            f"compute.kv_dtype int8 is for heads of {INT8_HEAD_DIMS.start} to {INT8_HEAD_DIMS[-1]} columns, a multiple "
            f"of {INT8_HEAD_DIMS.step}, and this model has heads of {head_dim}: say float32 or bfloat16",
            fields=("compute.kv_dtype",),
        )


def unused(rule: Unused, choices: Choices, given: Iterable[tuple[str, object]]) -> tuple[str, ...]:
    """The names of what was given although this rule says that it plays no part."""
    if not rule.applies(choices):
        return ()
    return tuple(name for name, value in given if name in rule.fields and value not in rule.fine)


def leave_out(rule: Unused, choices: Choices, refused: tuple[str, ...], hint: str = "") -> OptionError:
    """What to raise for them."""
    why = rule.why.format(mode=choices.protection.name)
    return OptionError(why, hint=f"leave out {', '.join(refused)}{hint}", fields=refused)


def _values(run: RunConfig) -> Iterable[tuple[str, object, object]]:
    """Each option's name, value and default."""
    yield "protection", run.protection, None
    for section in ("worker", "guard", "compute"):
        config = getattr(run, section)
        for field in fields(config):
            yield f"{section}.{field.name}", getattr(config, field.name), field.default


def _address(text: str) -> Address:
    from tsqp.wire.transport.address import parse_address  # with it comes zmq, which no --help needs

    return parse_address(text)


def _dealer(run: RunConfig) -> Address:
    return _address(str(run.guard.dealer))


def _open_line(run: RunConfig) -> bool:
    """Whether there is a dealer that is reached without keys."""
    return run.guard.dealer is not None and run.guard.dealer_key is None


def _same_place(one: Address, other: Address) -> bool:
    """Whether two addresses lead to the same socket, as far as they tell."""
    if "mem" in (one.transport, other.transport):
        return one == other
    if one.transport == other.transport == "tcp":
        same_host = one.host == other.host or (one.is_loopback and other.is_loopback)
        return same_host and one.port == other.port
    if "tcp" in (one.transport, other.transport):
        return False
    return one.path.resolve() == other.path.resolve()


def _same_key(run: RunConfig) -> bool:
    """Whether the dealer has the key of the worker."""
    from tsqp.wire.transport.keys import load_public

    worker, dealer = run.worker.server_key, run.guard.dealer_key
    return worker is not None and dealer is not None and load_public(worker) == load_public(dealer)
