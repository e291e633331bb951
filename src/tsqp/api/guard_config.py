"""What can be chosen about the private modes, by flag, variable or in Python; checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token

from tsqp.api.plan import refuse_unused
from tsqp.cli.help_groups import PADS, PRIVACY
from tsqp.config.protection import Protection
from tsqp.errors import OptionError

DEALER = "dealer="
MAX_CHECKS = 16
OF_A_DEALER = ("dealer_key", "dealer_no_separation")
OF_PADS = ("pad_source", *OF_A_DEALER, "pads_ahead", "pad_memory", "pads_empty", "warm_pads")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of ``512MB``, ``2GB``, ``1GiB`` or a plain number. Raises OptionError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"--pad-memory '{text}' is no size: use bytes, or a number with MB, GB, MiB or GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _size(_: Any, tokens: Sequence[Token]) -> int:
    return parse_size(tokens[0].value)


@Parameter(name="*", group=PADS)
@dataclass(frozen=True)
class GuardConfig:
    """How products are checked and where pads come from. Everything but the first two is for ``masked`` only.

    ``checks``: check vectors; a cheating worker goes unnoticed with probability 2^(-31·checks) a session.
    ``model_digest``: refuse any other model than the one with this digest. ``pad_source``: ``tee`` (this process
    multiplies pads by the weights) or ``dealer=ADDR`` (a second worker that does not collude with the first).
    ``dealer_key``: the file of the dealer's public key, for tcp; ``dealer_no_separation``: accept a dealer over shm,
    ipc or plain tcp on this host, where whoever runs the worker can read what the dealer says. ``own_key``: the file
    of this side's secret key, for the dealer; that of ``security`` when not given. ``pads_ahead``: tokens whose pads
    are kept ready, as far as ``pad_memory`` bytes allow. ``pads_empty``: ``wait`` for missing pads to be made, or
    ``refuse``. ``warm_pads``: fill the pool before the first call.
    """

    checks: Annotated[
        int,
        Parameter(
            env_var="TSQP_CHECKS",
            group=PRIVACY,
            help="Check vectors: a cheat passes with probability 2^(-31·checks) (masked and verified).",
        ),
    ] = 2
    model_digest: Annotated[
        str | None,
        Parameter(
            env_var="TSQP_MODEL_DIGEST",
            group=PRIVACY,
            help="Refuse any model but the one with this digest (tsqp model info --digest) (masked and verified).",
        ),
    ] = None
    pad_source: Annotated[
        str,
        Parameter(
            env_var="TSQP_PAD_SOURCE",
            help="Who multiplies pads by the weights: tee (this process) or dealer=ADDR (a second worker, of a party "
            "that does not collude with the first one's); masked only, like all about pads.",
        ),
    ] = "tee"
    dealer_key: Annotated[
        Path | None, Parameter(env_var="TSQP_DEALER_KEY", help="The dealer's public key file, for tcp (masked only).")
    ] = None
    dealer_no_separation: Annotated[
        bool,
        Parameter(
            env_var="TSQP_DEALER_NO_SEPARATION",
            help="Allow a dealer over shm, ipc or plain loopback: for tests, whoever runs the worker may read it "
            "(masked only).",
        ),
    ] = False
    own_key: Annotated[Path | None, Parameter(parse=False)] = None  # on the command line, --key
    pads_ahead: Annotated[
        int,
        Parameter(env_var="TSQP_PADS_AHEAD", help="Tokens whose pads are kept ready, as memory allows (masked only)."),
    ] = 256
    pad_memory: Annotated[
        int,
        Parameter(
            env_var="TSQP_PAD_MEMORY",
            converter=_size,
            show_default=lambda size: f"{size >> 20}MiB",
            help="The most memory for pads: bytes, or such as 512MB or 2GB (masked only).",
        ),
    ] = 1 << 30
    pads_empty: Annotated[
        Literal["wait", "refuse"],
        Parameter(
            env_var="TSQP_PADS_EMPTY",
            help="When pads are missing: make them and go on, or refuse the call (masked only).",
        ),
    ] = "wait"
    warm_pads: Annotated[
        bool, Parameter(env_var="TSQP_WARM_PADS", help="Fill the pool before the first call (masked only).")
    ] = False

    @property
    def dealer(self) -> str | None:
        """The dealer's address."""
        return self.pad_source.removeprefix(DEALER) if self.pad_source.startswith(DEALER) else None

    def check(self) -> None:
        """Raises OptionError that names what is wrong."""
        if not 1 <= self.checks <= MAX_CHECKS:
            raise OptionError(f"--checks must be 1 to {MAX_CHECKS}, not {self.checks}")
        if self.model_digest is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.model_digest):
            raise OptionError("--model-digest is 64 hex digits: tsqp model info MODEL --digest shows them")
        if self.pad_source != "tee" and not self.dealer:
            raise OptionError(f"unknown --pad-source '{self.pad_source}': use tee or dealer=ADDR")
        if self.pads_ahead < 0:
            raise OptionError(f"--pads-ahead must be 0 or more tokens, not {self.pads_ahead}")
        if self.warm_pads and not self.pads_ahead:
            raise OptionError("--warm-pads fills a pool that --pads-ahead 0 keeps empty: leave out one of them")
        if self.pad_memory < 0:
            raise OptionError(f"--pad-memory must be 0 or more bytes, not {self.pad_memory}")
        if self.pads_empty not in ("wait", "refuse"):
            raise OptionError(f"--pads-empty is wait or refuse, not '{self.pads_empty}'")

    @classmethod
    def of(cls, protection: Protection, given: GuardConfig | None) -> GuardConfig:
        """What was given, checked, or the defaults. Raises OptionError that also names what would play no part."""
        if given is None:
            return cls()
        given.check()
        if not protection.checked:
            raise OptionError(f"protection {protection.name} checks no products: leave out guard")
        if not protection.masked:
            refuse_unused(f"protection {protection.name} has no pads", given._changed((*OF_PADS, "own_key")))
        elif given.dealer is None:
            refuse_unused("pads come from this process, not from a dealer", given._changed((*OF_A_DEALER, "own_key")))
        return given

    def _changed(self, names: Sequence[str]) -> dict[str, object]:
        """Those of ``names`` that are not at their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: str(getattr(self, name)) for name in names if getattr(self, name) != defaults[name]}
