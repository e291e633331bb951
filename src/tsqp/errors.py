"""Every exception this package raises on purpose.

::

    TsqpError
    ├── InputError                the caller asked for something that cannot be done
    │   ├── OptionError           an unknown or unsupported option value
    │   ├── PolicyError           a file that should say what evidence is accepted, and does not
    │   └── PromptError           empty, or longer than the context
    ├── QueueFull                 as many requests wait as may wait; another time there may be room
    ├── CheckpointError
    │   ├── CheckpointNotFound
    │   ├── CorruptCheckpoint
    │   ├── UnsupportedModel      architecture, rope type or tokenizer kind, refused by name
    │   └── FetchError            a download that did not finish, or not with the pinned hash
    ├── NumericError              activations or logits that are not numbers
    ├── PadError                  one-time pads that must not be used, or are not there
    │   ├── PadReused             a pad was asked for twice, or in a forked process
    │   └── PadsExhausted         no pads ready, and the run was told not to wait for new ones
    ├── EvidenceRefused           what a server shows of itself is not what a client accepts
    ├── ProviderFailed            the TEE of this machine gave no quote, or one that does not answer the question
    ├── PathRefused               a file or directory that is not this user's alone, or cannot be used
    ├── ClusterError              workers that could not be placed, found or ended
    └── ChannelError              the line between the two sides; the session is dead afterwards
        ├── ArenaFull             the shared memory has no room for a tensor
        ├── AddressError          malformed, or refused for safety
        │   ├── AddressInUse
        │   └── MalformedAddress  an InputError too: no address at all
        ├── RosterError           a roster that cannot be had or used, or names no workers that make one model
        ├── WorkerUnreachable     nobody answered, or the keys did not match
        ├── WorkerLost            the worker went away after the handshake
        ├── WorkerFailed          the worker answered that it could not do the call
        ├── ModelMismatch         the two sides read different checkpoints
        ├── DeadlineExceeded
        ├── DeviceError           CUDA is not there, has failed, or does not do what a cuda address needs
        ├── ChannelClosed         used after close
        ├── ProtocolError         bytes that the protocol does not allow
        │   └── ReplyShapeError   a reply whose size is not that of the product asked for
        └── CheckFailed           the worker or the dealer cheats, or its machine is broken
            ├── ReplyRangeError   a product with numbers that are not canonical
            └── ProductMismatch   a product that is not the one asked for

    TsqpWarning                   what a user should know, and may go on with

The text of each is one line: what is wrong, and what to do about it. It never holds prompt text, tokens or keys. Where
an option is meant, the text has the name of its field, as ``guard.pad_memory``; ``fields`` lists those names, so that a
command can print the flags in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Side = Literal["worker", "dealer"]

MORE_PADS = ("guard.warm_pads", "guard.pads_ahead", "guard.pad_memory")  # the options that help where pads are missing


class TsqpError(Exception):
    """Base of every exception this package raises on purpose.

    ``fields``: the options that the text names. ``side``, ``address``: of the process that an error is about, where it
    is about one. ``hint``: what to do, and the end of the text.
    """

    def __init__(
        self,
        message: str,
        *,
        fields: tuple[str, ...] = (),
        side: Side | None = None,
        address: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message if hint is None else f"{message}: {hint}")
        self.fields = fields
        self.side = side
        self.address = address
        self.hint = hint

    def explained(self, name_of: Callable[[str], str]) -> str:
        """The text, with the name that ``name_of`` gives to a field in the place of that field."""
        if not self.fields:
            return str(self)
        names = "|".join(sorted(map(re.escape, self.fields), key=len, reverse=True))
        return re.sub(rf"(?<![\w.])(?:{names})(?!\w)", lambda found: name_of(found[0]), str(self))


class InputError(TsqpError):
    """The caller asked for something that cannot be done."""


class OptionError(InputError):
    """An unknown or unsupported option value."""


class PolicyError(InputError):
    """A file that should say what evidence is accepted, and does not. Nothing is accepted by it."""


class PromptError(InputError):
    """An empty prompt, or one longer than the context."""


class QueueFull(TsqpError):
    """As many requests wait as may wait. Nothing was begun; the same request may be asked again later."""


class CheckpointError(TsqpError):
    """A checkpoint that cannot be used."""


class CheckpointNotFound(CheckpointError):
    """No checkpoint at the place named."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint with missing, truncated or contradictory parts."""


class UnsupportedModel(CheckpointError):
    """An architecture, rope type or tokenizer kind that this package does not implement."""


class FetchError(CheckpointError):
    """A download that did not finish, or whose content is not the pinned one."""


class NumericError(TsqpError):
    """Logits that are not numbers: broken weights, an overflow in a narrow dtype, or a worker that answers nonsense."""


class PadError(TsqpError):
    """One-time pads that must not be used, or are not there."""


class PadReused(PadError):
    """A pad was asked for twice, or in a forked process, which has a copy of them all."""


class PadsExhausted(PadError):
    """No pads are ready, and the run was told not to wait for new ones. Nothing was sent."""


class EvidenceRefused(TsqpError):
    """What a server shows of itself is not what a client accepts. Nothing was sent to it that is worth keeping.

    ``field``: where, with a dot between section and name; ``found``, ``expected``: in words, without secrets. What was
    found is the other side's: it is shortened, and what a terminal might obey is escaped.
    """

    def __init__(self, field: str, found: str, expected: str) -> None:
        found = found[:300].encode("unicode_escape").decode("ascii")
        super().__init__(f"refused: {field} is {found}, and not {expected}")
        self.field = field
        self.found = found
        self.expected = expected


class ProviderFailed(TsqpError):
    """The TEE of this machine gave no quote, or one that does not answer the question. Another question may succeed.

    ``provider``: its name, as ``--evidence`` has it. The text does not hold what was asked.
    """

    def __init__(self, provider: str, problem: str, remedy: str) -> None:
        super().__init__(f"{provider}: {problem}", hint=remedy)
        self.provider = provider


class PathRefused(TsqpError):
    """A file or directory that is not this user's alone (``unsafe``), or that the system does not let it use."""

    def __init__(self, path: Path, problem: str, remedy: str, *, unsafe: bool, fields: tuple[str, ...] = ()) -> None:
        super().__init__(f"{path} {problem}; {remedy}", fields=fields)
        self.path = path
        self.problem = problem
        self.remedy = remedy
        self.unsafe = unsafe


class ClusterError(TsqpError):
    """Workers that could not be placed, found or ended."""


class ChannelError(TsqpError):
    """A failure of the line between the two sides.

    ``side``: who is at the other end, ``worker`` or ``dealer``. ``address``: where, in an error about that side itself;
    then ``text`` is what that side did, without a subject. The message is made of the three. ``worker``: of several
    workers, the one that it is about, by its name; see ``of_worker``.
    """

    def __init__(
        self,
        text: str,
        *,
        fields: tuple[str, ...] = (),
        side: Side = "worker",
        address: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(text, fields=fields, side=side, address=address, hint=hint)
        self.worker: str | None = None
        self._where: str | None = None

    def of_worker(self, name: str, address: str) -> None:
        """Say which of several workers it is about, and where that one is. The first to say so is right."""
        if self.worker is None:
            self.worker, self._where = name, address

    def __str__(self) -> str:
        text = super().__str__()
        if self.address is not None:
            return f"{self.address}: the {self.side} {text}"
        if self._where is not None:
            return f"{self._where}: {text}"
        return text if self.side == "worker" else f"the {self.side}: {text}"


class AddressError(ChannelError):
    """An address that is malformed, or refused because it would be unsafe."""


class MalformedAddress(AddressError, InputError):
    """A text that is no address."""


class AddressInUse(AddressError):
    """Another live worker holds this address."""


class ArenaFull(ChannelError):
    """The shared memory of a connection has no room for a tensor."""


class RosterError(ChannelError):
    """A roster that cannot be had or used, or whose workers do not make one model. Another one may."""


class WorkerUnreachable(ChannelError):
    """Nobody answered at the address, or the keys did not match."""


class WorkerLost(ChannelError):
    """The worker went away after the handshake."""


class WorkerFailed(ChannelError):
    """The worker answered that it could not do the call."""


class ModelMismatch(ChannelError):
    """The two sides read different checkpoints."""


class DeadlineExceeded(ChannelError):
    """No reply within the deadline. Whether the worker did the work is unknown."""


class DeviceError(ChannelError):
    """CUDA is not there, has failed for good, or does not do what a connection over device memory needs."""


class ChannelClosed(ChannelError):
    """The channel was used after it was closed."""


def model_closed() -> ChannelClosed:
    """What ends whatever is under way, or is begun, once a model was closed."""
    return ChannelClosed("the model was closed")


class ProtocolError(ChannelError):
    """Bytes that the protocol does not allow."""


class ReplyShapeError(ProtocolError):
    """A reply whose size is not the size of the product that was asked for."""

    def __init__(self, expected_bytes: int, got_bytes: int) -> None:
        super().__init__(f"the reply has {got_bytes} bytes where the product has {expected_bytes}")
        self.expected_bytes = expected_bytes
        self.got_bytes = got_bytes


class CheckFailed(ChannelError):
    """A product failed its check: whoever computed it cheats, or its machine is broken. Nothing was made of it.

    ``row`` of the call, ``part`` of its columns: the first that is wrong, in the product of a worker; else None.
    """

    def __init__(self, text: str, row: int | None = None, part: int | None = None) -> None:
        super().__init__(text)
        self.row = row
        self.part = part


class ReplyRangeError(CheckFailed):
    """A product with numbers outside of the range in which there is one way to write each."""


class ProductMismatch(CheckFailed):
    """A product that is not that of the input and the weights asked for."""


class TsqpWarning(UserWarning):
    """Base of every warning that this package gives: not an exception of the tree above, unless a filter says so."""


def forget_frames(error: BaseException | None) -> None:
    """Let go of the frames that an error went through, and of those before it: they hold memory, and tensors in it."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
