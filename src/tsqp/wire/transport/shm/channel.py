"""The trusted side's end of a shared-memory connection."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from contextlib import ExitStack, closing

from tsqp.errors import ChannelClosed, DeadlineExceeded, ProtocolError, WorkerLost
from tsqp.wire.channel import MAX_FRAME_BYTES, DirectLine, Frames
from tsqp.wire.slot import Slot
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.base import CONNECT_TIMEOUT_S, SEND_TIMEOUT_S, BaseChannel, Deadline, check_limits
from tsqp.wire.transport.shm.arena import Arena
from tsqp.wire.transport.shm.packets import (
    NO_BYTES,
    OPENING,
    PACKET_BYTES,
    SHM_VERSION,
    Answer,
    Opening,
    Region,
    Request,
    decode_answer,
    encode_opening,
    encode_request,
    encode_sequence,
    request_places,
)
from tsqp.wire.transport.shm.segment import ARENA_BYTES, ArenaKind, Backed, Segment
from tsqp.wire.transport.shm.spin import CROWDED_S, REST_S, SPIN_S, Spin
from tsqp.wire.transport.shm.unix import dial

SLOW_S = 2 * SPIN_S  # a sleep longer than this was not worth the spin before it
MAX_UNDER_WAY = 256  # calls without their reply; so many packets fit into the socket, and a worker is never held up

_READABLE = select.POLLIN
_EITHER = select.POLLIN | select.POLLOUT


class UnderWay:
    """What must stay as it is until a reply is here: the memory of its call, and the place of its product.

    ``slow``: the last reply to such a call took so long that spinning for the next one is a waste.
    """

    def __init__(self, tensors: tuple[memoryview, ...], product: tuple[memoryview, ...]) -> None:
        self.tensors = tensors
        self.product = product
        self.slow = False


_NO_MEMORY = UnderWay((), ())


class ShmSlot(Slot):
    """A place in one arena for a tensor and its product, with the part of its packets that is always the same."""

    def __init__(self, arena: Arena, size: int, reply_bytes: int) -> None:
        tensor, own = arena.reserve(size)
        product, place = arena.reserve(reply_bytes)
        super().__init__(tensor, reply_bytes)
        self.arena = arena
        self.memory = UnderWay((tensor,), (product,) if reply_bytes else ())
        self.places = request_places((own,), place)
        self.sequence = -1  # of its last call; no packet has this one


def connect_shm(
    address: Address,
    *,
    arena: ArenaKind = "memfd",
    arena_bytes: int = ARENA_BYTES,
    spin_s: float = SPIN_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    user: int | None = None,
) -> ShmChannel:
    """Connect and hand over an arena; a worker that is still loading takes it later.

    ``arena_bytes`` bounds the memory that both sides together, and so a hostile worker, can make resident.
    ``user``: the user id of the worker, which is this one's when not given.
    Raises WorkerUnreachable, AddressError, PathRefused.
    """
    with ExitStack() as resources:
        line = resources.enter_context(closing(dial(address, connect_timeout_s, user)))
        segment = resources.enter_context(closing(Segment(arena, arena_bytes)))
        opening = encode_opening(Opening(SHM_VERSION, None if segment.path is None else str(segment.path)))
        try:
            socket.send_fds(line, [opening], [segment.fd] if segment.path is None else [])
        except OSError:
            raise WorkerLost("went away; start it again and connect anew", address=str(address)) from None
        return ShmChannel(address, max_frame_bytes, line, segment, spin_s, resources.pop_all())


class ShmChannel(BaseChannel):
    """See Channel, and DirectLine, which is what ``direct`` gives.

    A worker's packet says which call it answers; everything else about a reply is known here.
    What another kind of memory does otherwise: ``_hand_over`` and ``_take_over``, ``_place``, and two words.
    """

    kind = "shared memory"
    remedy = "; under a limit on memory, choose fewer bytes by arena_bytes"  # where it is refused
    crowded_s, rest_s, packet_bytes = CROWDED_S, REST_S, PACKET_BYTES  # of DirectLine

    def __init__(
        self,
        address: Address,
        max_frame_bytes: int,
        line: socket.socket,
        segment: Backed,
        spin_s: float,
        resources: ExitStack,
    ) -> None:
        super().__init__(address, max_frame_bytes)
        self._line = line
        self.descriptor = line.fileno()
        self.spin_s = spin_s
        self._segment = segment
        self._arena = Arena(segment)
        self._spin = Spin(spin_s)
        self._resources = resources
        self._poller = select.poll()
        self._sequence = OPENING
        self._under_way = {OPENING: _NO_MEMORY}
        self._arrived: deque[Frames] = deque()  # read while there was no room to send

    def _reserve(self, size: int) -> memoryview:
        return self._arena.reserve(size)[0]

    def slot(self, size: int, reply_bytes: int) -> Slot:
        """See Channel.slot."""
        self._check_alive()
        try:
            self._check_size(size)
            self._check_size(reply_bytes)
            return ShmSlot(self._arena, size, reply_bytes)
        except BaseException as error:
            self._die_of(error)
            raise

    def send_from(self, slot: Slot, control: bytes) -> None:
        """See Channel.send_from. Nothing of the request but its number and its control frame is made here."""
        self._check_alive()
        if not isinstance(slot, ShmSlot) or slot.arena is not self._arena:
            return super().send_from(slot, control)
        try:
            check_limits(Frames(control), self._max_frame_bytes)
            if slot.sequence in self._under_way:  # a second call would be written over the first
                raise ProtocolError(f"{self.address}: a call from a slot whose last call is under way")
            sequence = self._next_sequence()
            self._put(sequence, encode_sequence(sequence) + slot.places + control, slot.memory)
            slot.sequence = sequence
        except BaseException as error:
            self._die_of(error)
            raise

    def direct(self) -> DirectLine | None:
        """See Channel.direct."""
        self._check_alive()
        return self

    def packet(self, slot: Slot, control: bytes) -> tuple[bytes, memoryview]:
        """See DirectLine.packet."""
        own = self._own(slot)
        check_limits(Frames(control), self._max_frame_bytes)
        return encode_sequence(0) + own.places + control, own.memory.product[0]

    def numbers(self, count: int) -> int:
        """See DirectLine.numbers."""
        self._check_alive()
        if self._under_way or self._arrived:
            raise ChannelClosed(f"{self.address}: numbers for direct calls while other calls are under way")
        first = self._sequence + 1
        self._sequence += count
        return first

    def settle(self, slot: Slot, number: int, deadline_s: float, *, unsent: bytes = b"", came: bytes = b"") -> bytes:
        """See DirectLine.settle."""
        self._check_alive()
        try:
            memory = self._own(slot).memory
            if unsent:
                self._put(number, unsent, memory)
            self._under_way[number] = memory
            frames = self._taken(came) if came else None
            return (frames or self._receive(deadline_s)).control
        except BaseException as error:
            self._die_of(error)
            raise

    def _own(self, slot: Slot) -> ShmSlot:
        if not isinstance(slot, ShmSlot) or slot.arena is not self._arena:
            raise ProtocolError(f"{self.address}: a slot of another channel")
        return slot

    def _send(self, frames: Frames, reply_bytes: int) -> None:
        control, tensors = frames
        sequence = self._next_sequence()
        if tensors or reply_bytes:
            request, under_way = self._lay_out(sequence, frames, reply_bytes)
        else:
            request, under_way = Request(sequence, control), _NO_MEMORY
        self._put(sequence, encode_request(request), under_way)

    def _next_sequence(self) -> int:
        """The number of the next request, once there may be one more."""
        while len(self._under_way) >= MAX_UNDER_WAY:
            self._make_room(_READABLE)
        self._sequence += 1
        return self._sequence

    def _put(self, sequence: int, packet: bytes, under_way: UnderWay) -> None:
        self._hand_over(under_way)
        while not self._sent(packet):
            self._make_room(_EITHER)
        self._under_way[sequence] = under_way

    def _receive(self, deadline_s: float) -> Frames:
        if self._arrived:
            return self._arrived.popleft()
        awaited = next(iter(self._under_way.values()), _NO_MEMORY)  # the oldest call
        frames = self._spin.ask(self._next_reply, once=awaited.slow)
        if frames is not None:
            awaited.slow = False
            return frames
        slept = time.monotonic()
        frames = self._await_reply(Deadline(deadline_s))
        if awaited is not _NO_MEMORY:  # the next such call leaves its core to the worker from the start
            awaited.slow = time.monotonic() - slept > SLOW_S
        return frames

    def _arrived_within(self, deadline: Deadline) -> bool:
        while not self._arrived:
            frames = self._next_reply()
            if frames is not None:
                self._arrived.append(frames)
            elif deadline.passed:
                return False
            else:
                self._sleep(_READABLE, deadline)
        return True

    def _await_reply(self, deadline: Deadline) -> Frames:
        while not deadline.passed:
            self._sleep(_READABLE, deadline)
            frames = self._next_reply()
            if frames is not None:
                return frames
        raise self._nothing_came()

    def _release(self) -> None:
        self._under_way.clear()
        self._arrived.clear()
        self._resources.close()
        del self._arena, self._segment  # the mapping goes with the last tensor in it

    def _lay_out(self, sequence: int, frames: Frames, reply_bytes: int) -> tuple[Request, UnderWay]:
        """Give everything its place in the arena; what does not lie there yet is copied."""
        placed = [self._place(tensor) for tensor in frames.tensors]
        tensors, regions = tuple(view for view, _ in placed), tuple(region for _, region in placed)
        if not reply_bytes:
            return Request(sequence, frames.control, regions, NO_BYTES), UnderWay(tensors, ())
        product, place = self._arena.reserve(reply_bytes)
        return Request(sequence, frames.control, regions, place), UnderWay(tensors, (product,))

    def _place(self, tensor: memoryview) -> tuple[memoryview, Region]:
        region = self._arena.region_of(tensor)
        if region is not None:
            return tensor, region
        view, region = self._arena.reserve(tensor.nbytes)
        view[:] = tensor.cast("B")
        return view, region

    def _sent(self, packet: bytes) -> bool:
        """Hand a packet to the kernel; False where it has no room for it."""
        try:
            self._line.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            for _ in range(MAX_UNDER_WAY):  # what the worker said before it left tells why it left
                self._next_reply()
            raise self._lost() from None
        return True

    def _next_reply(self) -> Frames | None:
        """The reply that is here, if one is."""
        try:
            packet = self._line.recv(PACKET_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # said once, ahead of the packets that had arrived; the end is said after them
            packet = None
        if packet is None:  # not above, where what is raised would keep that error with its frames
            return self._next_reply()
        if not packet:
            raise self._lost()
        return self._taken(packet)

    def _taken(self, packet: bytes) -> Frames | None:
        answer = decode_answer(packet)
        under_way = self._under_way.pop(answer.sequence, None)
        if under_way is None:
            raise ProtocolError(f"{self.address}: an answer to packet {answer.sequence}, which is not under way")
        if answer.sequence == OPENING:
            self._opened(answer)
            return None
        self._take_over(under_way)
        return Frames(answer.control, under_way.product)

    def _hand_over(self, under_way: UnderWay) -> None:
        """Have the worker see the tensors of a call. In shared memory it does."""

    def _take_over(self, under_way: UnderWay) -> None:
        """Have this side see the product of a call that was answered. In shared memory it does."""

    def _opened(self, answer: Answer) -> None:
        if answer.control:
            raise WorkerLost(
                f"refused the {self.kind}: {answer.control[:200]!a}{self.remedy}",
                fields=("arena_bytes",),
                address=self.address,
            )
        self._segment.remove_name()

    def _make_room(self, events: int) -> None:
        """Wait until the worker is ready for more, and take in its replies meanwhile: it may wait for that."""
        deadline = Deadline(SEND_TIMEOUT_S)
        self._sleep(events, deadline)
        if deadline.passed:
            raise DeadlineExceeded("takes no more calls; it has stalled", address=self.address)
        frames = self._next_reply()
        if frames is not None:
            self._arrived.append(frames)

    def _sleep(self, events: int, deadline: Deadline) -> None:
        self._poller.register(self._line, events)
        self._poller.poll(deadline.remaining_ms)

    def _lost(self) -> WorkerLost:
        return WorkerLost("went away; start it again and connect anew", address=self.address)
