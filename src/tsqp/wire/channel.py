"""What a transport must offer: a Channel for the trusted side, a Listener for the worker.

Both move *frames*: one control frame of bounded size and the raw bytes of its tensors. Many messages may be under way
on one channel in both directions; a transport keeps the order of each direction and never mixes the frames of two
messages. Nothing falls back, reconnects or retries: after any exception a channel is dead and stays dead, and every
later call raises ChannelClosed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.slot import Slot

MAX_TENSORS = 2  # tensors of one message
MAX_FRAME_BYTES = 2**32  # one tensor; attention scores of 32 heads × 2,048 rows × 8,192 keys in float32 are half of it


class Frames(NamedTuple):
    """One message: its control frame and the bytes of its tensors."""

    control: bytes
    tensors: Sequence[memoryview] = ()


class DirectLine(Protocol):
    """The socket of a channel, for who sends calls from slots and takes their answers himself, one after another.

    A packet is 8 bytes of number, lowest first, and what ``packet`` says; its answer begins with the same 8 bytes, and
    goes on with a control frame. Whatever goes another way is dealt with by ``settle``. What is said of a Channel holds
    here too.
    """

    descriptor: int
    spin_s: float  # how long to ask again before sleeping; see transport/shm/spin.py, also for the next two
    crowded_s: float
    rest_s: float
    packet_bytes: int  # no packet has more

    def packet(self, slot: Slot, control: bytes) -> tuple[bytes, memoryview]:
        """The packet of a call from a slot, its number 0; and the memory of the reply, which **the worker can change**.

        Only one call from a slot may be under way.
        """

    def numbers(self, count: int) -> int:
        """The first of so many numbers for packets to be sent one after another, while no other call is under way."""

    def settle(self, slot: Slot, number: int, deadline_s: float, *, unsent: bytes = b"", came: bytes = b"") -> bytes:
        """The control frame of the answer to packet ``number``: received, or in ``came``, a packet that was received.

        ``unsent``: the packet itself, where it could not be sent. Raises as ``send`` and ``receive``.
        """


class Channel(Protocol):
    """The trusted side's end of one connection. Not thread-safe: one thread uses it."""

    @property
    def transport(self) -> str:
        """The transport really in use: ``mem``, ``ipc``, ``tcp``, ``shm`` or ``cuda``."""

    @property
    def address(self) -> str:
        """The address really in use, as a user would type it."""

    def reserve(self, size: int) -> memoryview:
        """Writable memory for one tensor of a message to come: a tensor that lies in it is sent without a copy.

        Over shm **the worker can read it from the first byte written**, before the message is sent: write nothing to
        it that the worker may not see. It is free again when nothing refers to it or to what was made over it
        (a slice, a tensor). Raises InputError for a size over the limit, ArenaFull, ChannelClosed.
        """

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        """Queue one message without waiting for a reply; ``reply_bytes`` is the size of the product expected in it.

        Tensors are not copied, except over shm those that lie outside of reserved memory. Their memory must stay
        unchanged until the reply to this message has been received. Raises ProtocolError for a message over the
        limits, InputError for such a product, ArenaFull, WorkerLost, ChannelClosed.
        """

    def slot(self, size: int, reply_bytes: int) -> Slot:
        """Memory for one call after another, of a tensor of ``size`` bytes each; what ``reserve`` says holds for it.

        The reply to a call lies in the slot too, where a transport has memory for replies: until the next call.
        """

    def send_from(self, slot: Slot, control: bytes) -> None:
        """``send`` of the slot's tensor, once the reply to the slot's last call is here: otherwise, over shm, where one
        would be written over the other, ProtocolError.
        """

    def direct(self) -> DirectLine | None:
        """For who sends calls from slots by code of its own; None where that cannot be done."""

    def arrived(self, within_s: float) -> bool:
        """Whether ``receive`` would not have to wait, after at most so many seconds; the channel outlives a no.

        True as well once the worker is gone, which ``receive`` then says. Raises WorkerLost, ProtocolError,
        ChannelClosed.
        """

    def receive(self, deadline_s: float) -> Frames:
        """The next message from the worker, in the order sent.

        Its tensors are private to the caller, except over shm: there **the worker can still change them at any
        time**, so read each byte once and believe only the copy; and what is there after a failed call is undefined.

        Raises DeadlineExceeded when none came within ``deadline_s`` seconds, WorkerLost when the worker is gone
        (at once, not at the deadline), ProtocolError for a message over the limits, ChannelClosed.
        """

    def close(self) -> None:
        """Release everything. Closing twice is allowed."""


class SlotsByReserve:
    """Slots of a channel that lays out nothing but what ``reserve`` does, and sees a call from one as any other.

    It has no direct line.
    """

    def slot(self, size: int, reply_bytes: int) -> Slot:
        """See Channel.slot."""
        return Slot(self.reserve(size), reply_bytes)

    def send_from(self, slot: Slot, control: bytes) -> None:
        """See Channel.send_from."""
        self.send(Frames(control, (slot.tensor,)), slot.reply_bytes)

    def direct(self) -> DirectLine | None:
        """See Channel.direct."""
        return None

    def reserve(self, size: int) -> memoryview:
        """See Channel.reserve."""
        raise NotImplementedError

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        """See Channel.send."""
        raise NotImplementedError


class DeviceTensors(NamedTuple):
    """The tensors of a message and the place of its product, where they are memory of a device."""

    tensors: tuple[DeviceMemory, ...]
    reply: DeviceMemory


class Arrival(NamedTuple):
    """A message at the worker, and the connection to answer on.

    ``reply`` is where its product is to be written, of exactly that size; None where a product is sent as a frame.
    ``ticket`` is the transport's own mark on the message. ``place`` names the memory of its tensors and its reply:
    messages of one connection with the same name have the same memory; empty where there is no such memory.
    ``device``: over cuda, the tensors and the reply, which ``frames`` and ``reply`` do not have then.
    """

    peer: bytes
    frames: Frames
    reply: memoryview | None = None
    ticket: int = 0
    place: bytes = b""
    device: DeviceTensors | None = None


class Departure(NamedTuple):
    """A connection ended; nothing more comes from it, and its name is not used again."""

    peer: bytes


class DirectCalls(Protocol):
    """The socket of a connection, for who receives its calls and answers them himself, one after another.

    A packet is a request as ``transport/shm/packets.py`` has them. Receiving it from the socket copies it, and only the
    copy, which no client can change, is looked at. Its answer begins with the same 8 bytes, and goes on with a control
    frame.
    """

    descriptor: int
    bell: int  # a descriptor that can be read when something is here from anybody, or it is time to stop
    spin_s: float  # how long to ask again before sleeping; see transport/shm/spin.py, also for the next two
    crowded_s: float
    rest_s: float
    packet_bytes: int  # no more of a packet is looked at

    def received(self, packet: bytes) -> Arrival | None:
        """The message in a packet that was received. None where it has none, or ends the connection, as b"" does."""


class Listener(Protocol):
    """The worker's end: every connection's messages arrive here. One thread uses it, except ``interrupt``."""

    @property
    def address(self) -> str:
        """The address that clients can connect to, with the port that the system chose."""

    def receive(self, timeout_s: float | None) -> Arrival | Departure | None:
        """The next message of any connection; None on timeout (``None`` waits for ever) or once ``interrupted``.

        Messages over the limits are dropped together with their connection where the transport can. The end of a
        connection is reported by mem, shm and cuda. ZeroMQ does not tell a router which of its peers has left, so over
        ipc and tcp nothing is reported: bound what is kept for a connection.
        """

    def send(self, arrival: Arrival, frames: Frames) -> None:
        """Answer one arrival; a peer that is gone, or that has stopped reading, is no error.

        A tensor that is ``arrival.reply`` itself is not copied; any other is copied there, and must be of its size. A
        product in ``arrival.device.reply`` is there already: then there is no tensor.
        Without a ``reply`` the tensors' memory must never be written again: it may be sent later, without a copy. It
        is kept alive until then. Raises ProtocolError for a message over the limits, ChannelClosed.
        """

    def memory(self, peer: bytes) -> memoryview | None:
        """All the memory that tensors and products of a connection lie in, for who has to do with the whole of it.

        It stays mapped while anything refers to it, also after the connection's ``Departure``. None where each message
        has memory of its own, and for a connection that is not there.
        """

    def direct(self, peer: bytes) -> DirectCalls | None:
        """For who serves one connection by code of his own for a moment: until ``bell``, or a few dozen messages.

        None where that cannot be done, or while anything else is known to be here.
        """

    @property
    def interrupted(self) -> bool:
        """Whether ``receive`` has been told to stop. It stays true: every later ``receive`` returns None at once."""

    def interrupt(self) -> None:
        """Make this and every later ``receive`` return None. May be called from a signal handler or another thread."""

    def close(self) -> None:
        """Release the address and everything else. Closing twice is allowed."""
