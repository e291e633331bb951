"""Which workers there are, as somebody says who is not trusted: ``docs/cluster.md`` §3.

Covers: what is read is bounded, and every address in it is one that the trusted side may connect to: with a key, or
without one on this machine (tests/wire/test_roster.py). Does not cover: whether what a roster says is true. Assumes:
nothing; what a roster says decides only who is talked to.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tsqp.config.shard import PATTERN, Shard
from tsqp.errors import AddressError, OptionError, RosterError
from tsqp.wire.transport.address import parse_address
from tsqp.wire.transport.keys import is_public_key

ROSTER_VERSION: Literal[1] = 1
MOST_MEMBERS = 4096
MOST_BYTES = 1 << 20  # of a document
_SHOWN = 160  # characters of a fault that an error repeats; they may be the sender's


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker: its address, its shard, and its public CURVE key in Z85, None where it has none."""

    address: Annotated[str, Meta(min_length=1, max_length=256)]
    shard: Annotated[str, Meta(pattern=PATTERN, max_length=40)]
    key: Annotated[str, Meta(min_length=40, max_length=40)] | None = None

    @property
    def name(self) -> str:
        """What it is known by, and expelled by: its key, or its address where it has none."""
        return self.key or self.address


class Roster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All workers. ``epoch`` grows with each change."""

    version: Literal[1]
    epoch: Annotated[int, Meta(ge=0, lt=2**62)]
    workers: Annotated[tuple[Member, ...], Meta(max_length=MOST_MEMBERS)]


_decoder = msgspec.json.Decoder(Roster, strict=True)


def read_roster(document: bytes) -> Roster:
    """The roster in a JSON document, its addresses in their normal form. Raises RosterError, which has one line."""
    if len(document) > MOST_BYTES:
        raise RosterError(f"the roster has {len(document)} bytes or more; the limit is {MOST_BYTES}")
    try:
        roster = _decoder.decode(document)
    # Bytes of a string that are not UTF-8 are a UnicodeDecodeError (a ValueError), deep nesting a RecursionError.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RosterError(f"the roster is none of version {ROSTER_VERSION}: {_shown(str(error))}") from None
    members = tuple(_checked(member) for member in roster.workers)
    names: set[str] = set()
    for member in members:
        if member.name in names:  # whoever is expelled by a name must not be there by another entry
            raise RosterError(f"the roster has two workers by the name of {_shown(member.name)}")
        names.add(member.name)
    return msgspec.structs.replace(roster, workers=members)


def roster_document(epoch: int, workers: list[Member]) -> bytes:
    """A roster as JSON, for who writes one. Raises RosterError for one that would not be read."""
    document = msgspec.json.encode(Roster(ROSTER_VERSION, epoch, tuple(workers)))
    read_roster(document)
    return document


def _checked(member: Member) -> Member:
    """The member with its address in the normal form: one worker has one name. Raises RosterError."""
    try:
        address = parse_address(member.address)
        Shard.parse(member.shard)
    except (AddressError, OptionError) as error:
        raise RosterError(f"a worker of the roster cannot be used: {_shown(str(error))}") from None
    if address.transport not in ("tcp", "shm", "ipc"):
        raise RosterError(f"the roster has a worker at {address}; it may have tcp, shm and ipc addresses")
    if address.transport != "tcp":
        if member.key is not None:
            raise RosterError(f"the roster has a key for {address}, and only tcp addresses have keys")
    elif address.port == 0:
        raise RosterError(f"the roster has a worker at {address}, and nothing can be reached at port 0")
    elif member.key is None and not address.is_loopback:
        raise RosterError(f"the roster has no key for {address}, which is not on this machine")
    elif member.key is not None and not is_public_key(member.key):
        raise RosterError(f"the roster has a key for {address} that is no public key in Z85")
    return msgspec.structs.replace(member, address=str(address))


def _shown(text: str) -> str:
    """Somebody else's text: what a terminal might obey is escaped, and it has an end."""
    return text[:_SHOWN].encode("unicode_escape").decode("ascii")
