"""Where a roster is to be had: in a file, or from a *front*, a process of the untrusted side that hands it out.

A front is asked over ZeroMQ, one request and one reply: the trusted side has that already, with its bounds, its
deadlines and its keys. The request is a control frame, the reply the same control frame and the document as its tensor.

Covers: whatever a front sends, or does not send, costs a bounded time and one RosterError; a document over 1 MiB is
refused before memory is allocated for it (tests/wire/test_front.py). Does not cover: a front that sends frame after
frame of one endless message, for the seconds until the deadline; a look-up of a host's name, which takes as long as
the system's resolver; whether what a front says is true. Assumes: nothing of a front.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tsqp.errors import ChannelError, DeadlineExceeded, MalformedAddress, RosterError, WorkerLost
from tsqp.wire.channel import Arrival, Frames, Listener
from tsqp.wire.roster import MOST_BYTES, ROSTER_VERSION, Roster, read_roster
from tsqp.wire.transport.address import Address, parse_address
from tsqp.wire.transport.base import Deadline
from tsqp.wire.transport.keys import ClientKeys, WorkerKeys
from tsqp.wire.transport.zmq import connect_zmq, listen_zmq

DEADLINE_S = 5.0  # for all of an answer
ASK = b"tsqp roster %d" % ROSTER_VERSION

_FILE, _FRONT = "roster://", "roster+"


class RosterAddress(NamedTuple):
    """Where a roster is: one of the two is not None."""

    file: Path | None
    front: Address | None

    def __str__(self) -> str:
        return f"{_FILE}{self.file}" if self.front is None else f"{_FRONT}{self.front}"


def parse_roster_address(text: str) -> RosterAddress:
    """From ``roster:///path`` or ``roster+tcp://host:port``. Raises MalformedAddress."""
    if text.startswith(_FILE + "/") and text.isprintable() and not text.endswith("/"):
        return RosterAddress(Path(text.removeprefix(_FILE)), None)
    if text.startswith(_FRONT + "tcp:"):
        front = parse_address(text.removeprefix(_FRONT))
        if front.port != 0:
            return RosterAddress(None, front)
    raise MalformedAddress(
        f"malformed address {text[:200]!a}: a roster is at roster:///path/to/file or roster+tcp://host:port"
    )


def find_roster(address: RosterAddress, security: ClientKeys | None = None, deadline_s: float = DEADLINE_S) -> Roster:
    """The roster there now. ``security``: for a front that has keys. Raises RosterError, which says where."""
    try:
        document = _asked(address.front, security, deadline_s) if address.front else _read(address.file)
        return read_roster(document)
    except RosterError as error:
        raise RosterError(f"{address}: {error}") from None


def read_document(path: Path) -> bytes:
    """What is in a file, at most one byte more than a roster may have. Raises OSError."""
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


class Front:
    """Hands a roster out to whoever asks, until it is interrupted. One thread uses it, except for ``interrupt``."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    @classmethod
    def listen(cls, address: Address, security: WorkerKeys | None = None, watch_fd: int | None = None) -> Front:
        """See ``listen_zmq``. Plain TCP may leave this machine: a roster is no secret. Raises AddressError."""
        plain = security is None
        return cls(
            listen_zmq(
                address,
                security=security,
                insecure_plain_tcp=plain,
                watch_fd=watch_fd,
                max_frame_bytes=MOST_BYTES,
            )
        )

    @property
    def address(self) -> str:
        """Where it listens, with the port that the system chose."""
        return self._listener.address

    def serve(self, document: Callable[[], bytes]) -> None:
        """Answer until interrupted; ``document`` gives the roster of the moment. Other requests get no answer."""
        while not self._listener.interrupted:
            arrival = self._listener.receive(None)
            if isinstance(arrival, Arrival) and arrival.frames.control == ASK and not arrival.frames.tensors:
                self._listener.send(arrival, Frames(ASK, (memoryview(document()),)))

    def interrupt(self) -> None:
        """End ``serve``. May be called from a signal handler or another thread."""
        self._listener.interrupt()

    def close(self) -> None:
        """Closing twice is allowed."""
        self._listener.close()


def _read(path: Path | None) -> bytes:
    try:
        return read_document(Path() if path is None else path)
    except OSError as error:
        raise RosterError(f"the roster cannot be read: {error.strerror}") from None


def _asked(front: Address, security: ClientKeys | None, deadline_s: float) -> bytes:
    """The document that a front answers with."""
    deadline = Deadline(deadline_s)
    plain = security is None  # allowed to leave this machine: rules.py says where it is not
    try:
        with closing(
            connect_zmq(
                front,
                security=security,
                insecure_plain_tcp=plain,
                connect_timeout_s=deadline_s,
                max_frame_bytes=MOST_BYTES,
            )
        ) as channel:
            channel.send(Frames(ASK))
            answer = channel.receive(deadline.remaining_s)
    except DeadlineExceeded:
        raise RosterError(f"the front sent no roster within {deadline_s:g} s") from None
    except WorkerLost:
        raise RosterError(f"the front ended the connection, or sent more than {MOST_BYTES} bytes") from None
    except ChannelError as error:
        raise RosterError(f"the front cannot be asked: {error}") from None
    if answer.control != ASK or len(answer.tensors) != 1:
        raise RosterError("the front answered something else than a roster; it may be of another version")
    return bytes(answer.tensors[0])
