"""The worker's end of one shared-memory connection: its socket, its mapping, and requests checked against it."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from tsqp.errors import ProtocolError
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.transport.shm.packets import (
    OPENING,
    PACKET_BYTES,
    SHM_VERSION,
    Answer,
    Region,
    decode_opening,
    decode_places,
    encode_answer,
    split_request,
)
from tsqp.wire.transport.shm.segment import map_descriptor, map_file
from tsqp.wire.transport.shm.unix import user_of

MAX_KNOWN_PLACES = 256  # of one connection: more than a model has shapes of calls


M = TypeVar("M")


class Connection(ABC, Generic[M]):
    """One client, whose memory is of a kind. Its requests name places in its own arena only: it harms nobody else's."""

    def __init__(self, peer: bytes, line: socket.socket, max_frame_bytes: int) -> None:
        self.peer = peer
        self.line = line
        self._max_frame_bytes = max_frame_bytes
        self._arena: M | None = None  # until it is here
        self._known: dict[bytes, tuple[tuple[M, ...], M]] = {}  # by places that were checked

    @property
    def opened(self) -> bool:
        """Whether the arena is here, so that whatever comes next is a request."""
        return self._arena is not None

    @property
    def memory(self) -> memoryview | None:
        """The whole arena; None before it is here, and afterwards."""
        return None

    def receive(self) -> Arrival | None:
        """The next message; None for the opening. Raises BlockingIOError, EOFError, OSError, ProtocolError."""
        if self._arena is None:
            self._arena = self._open()
            return None
        return self.received(self.line.recv(PACKET_BYTES))

    @abstractmethod
    def received(self, packet: bytes) -> Arrival:
        """The message in a packet that was received. Raises EOFError for the end of the connection, ProtocolError."""

    def answer(self, sequence: int, control: bytes) -> None:
        """Say that a request is answered. Raises OSError where that is not possible at once."""
        self.line.send(encode_answer(Answer(sequence, control)))

    def close(self) -> None:
        """Let go of socket and arena."""
        self.line.close()
        self._arena = None
        self._known.clear()

    @abstractmethod
    def _open(self) -> M:
        """Take the arena that the first packet offers, and answer it. Raises what ``receive`` does."""

    @abstractmethod
    def _cut(self, region: Region) -> M:
        """Bytes of the arena. Raises ProtocolError for a region that is too large, or not wholly inside."""

    def _lay_out(self, places: bytes) -> tuple[tuple[M, ...], M]:
        """The memory that places name. Raises ProtocolError.

        The next request of the same places has the same memory: the size of an arena never changes.
        """
        regions, product = decode_places(places)
        if any(_overlap(product, region) for region in regions):
            raise ProtocolError("a product in the place of its own input")
        if len(self._known) >= MAX_KNOWN_PLACES:
            self._known.clear()
        found = tuple([self._cut(region) for region in regions]), self._cut(product)
        self._known[places] = found
        return found

    def _check_inside(self, region: Region, arena_bytes: int) -> None:
        """Raises ProtocolError as ``_cut`` does."""
        if region.size > self._max_frame_bytes:
            raise ProtocolError(f"a tensor of {region.size} bytes; the limit is {self._max_frame_bytes}")
        end = region.offset + region.size
        if end > arena_bytes:
            raise ProtocolError(f"bytes {region.offset} to {end} of an arena that has fewer")


class ShmConnection(Connection[memoryview]):
    """The arena is mapped here; the mapping goes with the last tensor in it."""

    @property
    def memory(self) -> memoryview | None:
        return self._arena

    def received(self, packet: bytes) -> Arrival:
        if not packet:
            raise EOFError
        sequence, places, control = split_request(packet)
        tensors, product = self._known.get(places) or self._lay_out(places)
        return Arrival(self.peer, Frames(control, tensors), product, sequence, places)

    def _open(self) -> memoryview:
        packet, fds, _, _ = socket.recv_fds(self.line, PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if not packet:
                raise EOFError
            memory = _map(packet, fds, own=user_of(self.line) == os.geteuid())
        except ProtocolError as error:
            self.answer(OPENING, str(error).encode())
            raise
        finally:
            for fd in fds:
                os.close(fd)
        self.answer(OPENING, b"")
        return memory

    def _cut(self, region: Region) -> memoryview:
        memory = self._arena or memoryview(b"")
        self._check_inside(region, memory.nbytes)
        return memory[region.offset : region.offset + region.size]


def _map(packet: bytes, fds: list[int], *, own: bool) -> memoryview:
    """``own``: the client is this process's user, so that a name gives it nothing that it could not open itself."""
    opening = decode_opening(packet)
    if opening.version != SHM_VERSION:
        raise ProtocolError(f"shared memory of version {opening.version}; this side speaks {SHM_VERSION}")
    if opening.path is not None and not fds:
        if not own:
            raise ProtocolError("a file as arena, and from another user")
        return memoryview(map_file(opening.path))
    if opening.path is None and len(fds) == 1:
        return memoryview(map_descriptor(fds[0]))
    raise ProtocolError("an arena is one descriptor or one file")


def _overlap(one: Region, other: Region) -> bool:
    return one.offset < other.offset + other.size and other.offset < one.offset + one.size
