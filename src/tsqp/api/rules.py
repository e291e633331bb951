"""What is refused, and why: every rule about options, once. ``check`` holds a run against them before anything starts.

Three tables: ``VALUES``, what one option may be; ``UNUSED``, options that would play no part beside others and are
therefore refused by name; ``CONFLICTS``, options that cannot be what they are together. What depends on the model is
refused where the model is known: ``pads.py`` and ``private_links.py``.

Covers: a dealer with the worker's address or key, and a line to a dealer that the worker's host can read, are refused
before anything is started (tests/api/test_rules.py); so are a private mode and a dealer over cuda, where nothing is
isolated; no option that is refused is ignored instead, and no flag weakens
the protection (tests/cli/test_rules.py, tests/cli/test_options.py). Does not cover: two addresses and two keys of one
party. Assumes: the dealer's public key came from the party that runs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from tsqp.api.adapters import named_paths
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig, dealer_address, is_roster
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
        """Whether a worker has an address of this scheme, or may have one."""
        return any(address.startswith(scheme) or is_roster(address) for address in self.workers)

    @property
    def roster(self) -> bool:
        """Whether workers are those of a roster."""
        return any(map(is_roster, self.workers))

    @property
    def plain_front(self) -> bool:
        """Whether who changes a roster on its way decides who sees more than noise."""
        return not self.protection.masked and any(one.startswith("roster+") for one in self.workers)

    def over(self, scheme: str) -> bool:
        """Whether a worker or the dealer has an address of this scheme."""
        dealer = self.dealer or ""
        return self.worker_over(scheme) or dealer.startswith(scheme) or is_roster(dealer)


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
    "compute.oblivious_embedding": one_of(("auto", "scan", "oram")),
    "compute.prefill_chunk": at_least(1, "tokens"),
    "compute.micro_batches": Value("1 or more parts", lambda parts: parts is None or parts >= 1),
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
    Unused(
        "the worker of protection {mode} sees more than an oblivious look-up hides",
        ("compute.oblivious",),
        lambda of: of.split and not _checked(of),
        (False,),
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
    Unused("a roster names the workers' keys", ("worker.server_key",), lambda of: of.split and of.roster),
    Unused(
        "each worker of a roster has a key, or is on this machine",
        ("worker.insecure_plain_tcp",),
        lambda of: of.split and of.roster and not of.plain_front,
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
        "there is no worker with an shm or cuda address",
        ("worker.user",),
        lambda of: of.split and not (of.worker_over("shm://") or of.worker_over("cuda://")),
    ),
    Unused(
        "neither worker nor dealer is reached by shm or cuda",
        ("worker.arena_bytes",),
        lambda of: of.split and bool(of.workers) and not (of.over("shm://") or of.over("cuda://")),
    ),
)


CONFLICTS = (
    Conflict(
        "cuda:// gives no isolation: the worker can read and write device memory of this process at any time, so a "
        "worker.address may have it at protection open alone",
        ("worker.address", "protection"),
        lambda run: (
            PROTECTIONS[run.protection].checked and any(one.startswith("cuda://") for one in run.worker.addresses)
        ),
    ),
    Conflict(
        "cuda:// gives no isolation: guard.pad_source may not have it",
        ("guard.pad_source",),
        lambda run: (run.guard.dealer or "").startswith("cuda://"),
    ),
    Conflict(
        "at a worker.patience_s of 0 nothing takes over from a lost worker: leave out worker.spare",
        ("worker.patience_s", "worker.spare"),
        lambda run: run.worker.spare and not run.worker.patience_s,
    ),
    Conflict(
        "at compute.partition layer the worker runs the layers, and nothing can be added there on this side: leave out "
        "compute.lora, or use another compute.partition",
        ("compute.partition", "compute.lora"),
        lambda run: bool(run.compute.lora) and run.protection == "open" and run.compute.partition == "layer",
    ),
    Conflict(
        "compute.oblivious_embedding is a way to be oblivious: say compute.oblivious too",
        ("compute.oblivious_embedding", "compute.oblivious"),
        lambda run: run.compute.oblivious_embedding != "auto" and not run.compute.oblivious,
    ),
    Conflict(
        "worker.address names a worker twice: each further one is a standby for the others",
        ("worker.address",),
        lambda run: len(set(run.worker.addresses)) < len(run.worker.addresses),
    ),
    Conflict(
        "a roster names all workers: let it be the only worker.address",
        ("worker.address",),
        lambda run: len(run.worker.addresses) > 1 and any(map(is_roster, run.worker.addresses)),
    ),
    Conflict(
        "a roster is for masked and verified, where no worker is believed: at protection open give one worker.address",
        ("protection", "worker.address"),
        lambda run: run.protection == "open" and any(map(is_roster, run.worker.addresses)),
    ),
    Conflict(
        "whoever changes a roster on its way to this machine decides who sees what is computed at protection verified: "
        "give a file as worker.address, or a front on this machine, or allow it by worker.insecure_plain_tcp",
        ("protection", "worker.address", "worker.insecure_plain_tcp"),
        lambda run: run.protection == "verified" and not run.worker.insecure_plain_tcp and _front_away(run),
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
        lambda run: (
            run.worker.key is not None
            and run.worker.server_key is None
            and run.guard.dealer_key is None
            and not any(map(is_roster, (*run.worker.addresses, run.guard.dealer or "")))
        ),
    ),
    Conflict(
        "guard.dealer_key is the dealer's public key: give this side's secret one too, by worker.key",
        ("guard.dealer_key", "worker.key"),
        lambda run: run.guard.dealer_key is not None and run.worker.key is None,
    ),
    Conflict(
        "the dealer is not reached by tcp, or its key is in a file of several dealers: leave out guard.dealer_key",
        ("guard.dealer_key",),
        lambda run: run.guard.dealer_key is not None and not _dealer_by_tcp(run),
    ),
    Conflict(
        "the dealer is reached by tcp with keys: leave out guard.dealer_no_separation",
        ("guard.dealer_no_separation",),
        lambda run: run.guard.dealer_key is not None and run.guard.dealer_no_separation,
    ),
    Conflict(
        "the dealer is not on this host: give its public key by guard.dealer_key",
        ("guard.dealer_key",),
        lambda run: _open_line(run) and _dealer_by_tcp(run) and not _dealer_here(run),
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
            and any(_same(_where(run.guard.dealer), _where(one)) for one in run.worker.addresses)
        ),
    ),
    Conflict(
        "guard.dealer_key is the worker's key: a dealer must be another party's",
        ("guard.dealer_key",),
        lambda run: run.guard.dealer_key is not None and _same_key(run),
    ),
    Conflict(
        "compute.partition layer is of one device: name one in worker.device, or use another partition",
        ("compute.partition", "worker.device"),
        lambda run: "," in run.worker.device and _layers_there(run),
    ),
    Conflict(
        "worker.compiled is for one device: leave it out, or name one in worker.device",
        ("worker.compiled", "worker.device"),
        lambda run: "," in run.worker.device and run.worker.compiled,
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
    for address in run.worker.addresses:
        _where(address)  # now, and not once a model was read
    for conflict in CONFLICTS:
        if conflict.broken(run):
            raise OptionError(conflict.says, fields=conflict.fields)
    named_paths(run.compute.lora)


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


def _front_away(run: RunConfig) -> bool:
    """Whether a roster of workers comes from another machine."""
    places = [_where(one) for one in run.worker.addresses if is_roster(one)]
    return any(not isinstance(where, Path) and not where.is_loopback for where in places)


def _layers_there(run: RunConfig) -> bool:
    """Whether whole layers are on the worker."""
    return PROTECTIONS[run.protection].uses_worker and PARTITIONS[run.compute.partition].whole_layers


def _where(address: str) -> Address | Path:
    """What is connected to first: a worker or a dealer, or the front of several; or the file that names several."""
    if not is_roster(address):
        return _address(address)
    from tsqp.wire.transport.front import parse_roster_address

    found = parse_roster_address(address)
    return found.front or Path(str(found.file))


def _dealer_by_tcp(run: RunConfig) -> bool:
    """Whether the dealer, or the front of several, is reached by tcp."""
    where = _where(str(run.guard.dealer))
    return not isinstance(where, Path) and where.transport == "tcp"


def _dealer_here(run: RunConfig) -> bool:
    """Whether it has a tcp address of this machine."""
    where = _where(str(run.guard.dealer))
    return not isinstance(where, Path) and where.is_loopback


def _open_line(run: RunConfig) -> bool:
    """Whether there is a dealer, or a front of several, that is reached without keys; a file names keys."""
    where = None if run.guard.dealer is None else _where(run.guard.dealer)
    return where is not None and not isinstance(where, Path) and run.guard.dealer_key is None


def _same(one: Address | Path, other: Address | Path) -> bool:
    """Whether two lead to the same socket or file, as far as they tell."""
    if isinstance(one, Path) or isinstance(other, Path):
        return isinstance(one, Path) and isinstance(other, Path) and one.resolve() == other.resolve()
    return same_place(one, other)


def same_place(one: Address, other: Address) -> bool:
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
