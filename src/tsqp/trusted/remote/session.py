"""The trusted side of one connection: handshake, calls in flight, replies checked for size, statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec
import torch
from msgspec.structs import asdict

from tsqp.config.dtype import DtypeName, NumericPath, WireDtype, numeric_path
from tsqp.config.groups import GroupKey, GroupName, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, said, whole
from tsqp.errors import ChannelClosed, ChannelError, ModelMismatch, ProtocolError, ReplyShapeError, WorkerFailed
from tsqp.model.meter import CallKind
from tsqp.model.pending import NotKept
from tsqp.trusted.stats import Stats
from tsqp.wire.channel import Channel, DirectLine, Frames
from tsqp.wire.codec import decode_handshake, decode_reply, encode
from tsqp.wire.messages import (
    PROTOCOL_VERSION,
    Call,
    Done,
    Embed,
    GroupShape,
    Hello,
    Linear,
    MultiplyPads,
    Product,
    Reply,
    Stage,
    StagedDone,
    Welcome,
)
from tsqp.wire.payload import TORCH_DTYPES, PlainFormat, bytes_tensor, tensor_bytes, wire_format
from tsqp.wire.printable import printable
from tsqp.wire.slot import Slot

T = TypeVar("T")


class WorkerSession:
    """Calls to one worker. Any error ends it: the channel is closed and every later call raises.

    ``wire_dtype`` is the format of float payloads, ``dtype`` the one results are handed out in. ``deadline_s`` bounds
    the wait for each reply, ``handshake_s`` that for the first, where it is another. ``role``: what errors call the
    other side. ``shard``: what the worker has to hold, all of the model for None; ``digests`` are those of its slices,
    and so are the sizes of products.
    """

    def __init__(
        self,
        channel: Channel,
        config: ModelConfig,
        fingerprint: str,
        *,
        wire_dtype: WireDtype,
        dtype: DtypeName,
        stats: Stats,
        deadline_s: float,
        handshake_s: float | None = None,
        path: NumericPath = "float",
        digests: Mapping[GroupName, str] | None = None,
        role: Literal["worker", "dealer"] = "worker",
        shard: Shard | None = None,
    ) -> None:
        self.channel = channel
        self.config = config
        self.shard = shard or whole(config)
        self.stats = stats
        self._digests = digests
        self._role = role
        self._wire = wire_format(wire_dtype)
        self.dtype = TORCH_DTYPES[dtype]
        self.deadline_s = deadline_s
        self._next_id = 0
        self._under_way: dict[int, PendingReply[Any]] = {}
        self._dead: ChannelError | None = None
        self._path = path
        self._idle_slot: Slot | None = None
        try:
            self.welcome = self._handshake(
                Hello(PROTOCOL_VERSION, fingerprint, wire_dtype, path),
                deadline_s if handshake_s is None else handshake_s,
            )
        except ChannelError:
            channel.close()
            raise

    @property
    def address(self) -> str:
        """The address really in use, as a user would type it."""
        return self.channel.address

    @property
    def transport(self) -> str:
        """The transport really in use; see ``Channel``."""
        return self.channel.transport

    @property
    def under_way(self) -> int:
        """Calls whose replies are not here."""
        return len(self._under_way)

    @property
    def ended(self) -> ChannelError | None:
        """What has ended the session, None while it goes on."""
        return self._dead

    def next_id(self) -> int:
        """A call id that no earlier call of this session had."""
        self._next_id += 1
        return self._next_id

    def direct(self) -> DirectLine | None:
        """The line of calls that go round this session, if there is one."""
        self._raise_if_dead()
        return self.channel.direct()

    def direct_ids(self, count: int) -> int:
        """The first of so many ids, of direct calls. Raises the session's first ChannelError when it is dead."""
        self._raise_if_dead()
        first = self._next_id + 1
        self._next_id += count
        return first

    def busy_ns(self, control: bytes, call_id: int) -> int:
        """What the worker says of a call that it has done. Raises WorkerFailed, ProtocolError."""
        reply = decode_reply(control)
        if reply.id != call_id:
            raise ProtocolError(f"a reply from {self.channel.address} to call {reply.id}, which is not under way")
        return self._done(reply).busy_ns

    def reserve(self, size: int) -> memoryview:
        """Uninitialised memory for a payload, which is sent from there without a copy.

        Over shm **the worker can read it while it is written**, so write nothing to it that the worker may not see;
        and it can change it, so never read back from it. Raises ArenaFull, and ends the session with it.
        """
        self._raise_if_dead()
        try:
            return self.channel.reserve(size)
        except ChannelError as error:
            self._die(error)
            raise

    def slot(self, size: int, reply_bytes: int) -> Slot:
        """Memory for calls of one shape, one at a time, as ``reserve``; see ``Channel.slot``."""
        self._raise_if_dead()
        try:
            return self.channel.slot(size, reply_bytes)
        except ChannelError as error:
            self._die(error)
            raise

    @property
    def plain(self) -> bool:
        """Whether tensors of the compute dtype cross the line as they are."""
        return self._wire.dtype == self.dtype

    def input(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of the compute dtype for the input of a call; where that is the wire dtype it is not copied."""
        if not self.plain:
            return torch.empty(shape, dtype=self.dtype)
        return bytes_tensor(self.reserve(self._wire.size(shape)), self.dtype, shape)

    def start(
        self, kind: CallKind, call: Call, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]
    ) -> PendingReply[torch.Tensor]:
        """Send one call; ``shape`` is that of its product. Integer tensors go as they are, others as the wire dtype.

        Raises the session's first ChannelError when it is dead, WorkerLost, ProtocolError.
        """
        self._raise_if_dead()
        began = time.perf_counter()
        payloads = [self._payload(tensor) for tensor in tensors]
        read = lambda payload: self._wire.read(payload, shape, self.dtype)  # noqa: E731
        return self._send(PendingReply(self, kind, call, self._wire.size(shape), read, began), payloads)

    def ask(self, kind: CallKind, call: Call, slot: Slot) -> PendingReply[memoryview]:
        """Send one call from a slot; its product is the worker's bytes, of the size that the slot has for them.

        Raises the session's first ChannelError when it is dead, WorkerLost, ProtocolError.
        """
        self._raise_if_dead()
        began = time.perf_counter()
        return self._send(PendingReply(self, kind, call, slot.reply_bytes, _as_it_is, began), slot)

    def arrived(self, reply: PendingReply[Any], within_s: float) -> bool:
        """Whether a reply is here, after at most so many seconds; the session outlives a no.

        Raises any ChannelError, and ends the session with it.
        """
        self._raise_if_dead()
        end = time.monotonic() + within_s
        try:
            while reply.payload is None:
                if not self.channel.arrived(max(0.0, end - time.monotonic())):
                    return False
                self._receive(self.deadline_s)
        except ChannelError as error:
            self._die(error)
            raise
        return True

    def ping(self) -> None:
        """A call that has nothing to do with any text, and its reply, of which nothing is made.

        On the field path it is the product of a row of zeros, elsewhere the embedding of token 0: what the worker sees
        is the same each time. Raises any ChannelError, and ends the session with it.
        """
        if self._path != "field":
            call, shape = Embed(self.next_id(), 1), (1, self.config.hidden_size)
            self.start("embedding", call, [torch.zeros(1, dtype=torch.int32)], shape).wait()
            return
        self.send_ping()[0].wait()

    def send_ping(self) -> tuple[PendingReply[memoryview], Slot]:
        """``ping`` of the field path, of which the reply is to come, into the slot. There is one at a time."""
        name, layer = _of_a_ping(self.shard.keys(self.config))
        if self._idle_slot is None:
            group = linear_groups(self.config)[name]
            self._idle_slot = self.slot(4 * group.in_features, 4 * self.shard.width(group))
            self._idle_slot.tensor[:] = bytes(4 * group.in_features)
        return self.ask("linear", Product(self.next_id(), name, layer, 1, 4), self._idle_slot), self._idle_slot

    def fail(self, error: ChannelError) -> None:
        """End the session: every later call raises ``error``, or what has ended it before."""
        self._die(error)

    def _send(self, reply: PendingReply[T], payloads: Sequence[memoryview] | Slot) -> PendingReply[T]:
        row = self.stats.calls[reply.kind]
        control = encode(reply.call)
        serialised = time.perf_counter()
        try:
            if isinstance(payloads, Slot):
                self.channel.send_from(payloads, control)
                row.bytes_sent += len(control) + payloads.tensor.nbytes
            else:
                self.channel.send(Frames(control, payloads), reply.reply_bytes)
                row.bytes_sent += len(control) + sum(payload.nbytes for payload in payloads)
        except ChannelError as error:
            self._die(error)
            raise
        sent = time.perf_counter()
        self._under_way[reply.call.id] = reply
        row.count += 1
        row.held_s += sent - reply.began
        row.serialise_s += serialised - reply.began
        if self.stats.trace is not None:
            self.stats.traced("line", "send", reply.began, sent, id=reply.call.id)
        return reply

    def close(self) -> None:
        """End the session. Closing twice is allowed."""
        self._dead = self._dead or ChannelClosed(f"the session with the {self._role} was closed")
        self.channel.close()
        self._under_way.clear()  # they hold this session, which holds them, and all that is good for it alone

    def finish(self, reply: PendingReply[T]) -> T:
        """Wait for one reply and hand out its product. Raises any ChannelError, and ends the session with it.

        Over shm the product may lie in memory that the worker can still change: read each element once.
        """
        payload, arrived = self._take(reply)
        product = reply.read(payload)
        row, end = self.stats.calls[reply.kind], time.perf_counter()
        row.deserialise_s += end - arrived
        row.rpc_s += end - arrived
        row.held_s += end - arrived
        if self.stats.trace is not None:
            self.stats.traced("line", "take", arrived, end)
        return product

    def _take(self, reply: PendingReply[T]) -> tuple[memoryview, float]:
        """Wait for one reply; the bytes of its product, of the size asked for, and when they came."""
        self._raise_if_dead()
        waits = time.perf_counter()
        try:
            payload = self._payload_of(reply)
            if payload.nbytes != reply.reply_bytes:
                raise ReplyShapeError(reply.reply_bytes, payload.nbytes)
        except ChannelError as error:
            self._die(error)
            raise
        arrived = self.stats.heard_s = time.perf_counter()
        row = self.stats.calls[reply.kind]
        row.rpc_s += arrived - reply.began
        row.held_s += arrived - waits
        row.bytes_received += payload.nbytes
        # Whatever the worker says, it cannot have computed for longer than the call was under way.
        busy_s = min(reply.busy_ns * 1e-9, arrived - reply.began)
        row.worker_s += busy_s
        if self.stats.trace is not None:
            self.stats.traced("line", "wait", waits, arrived)
            said = {} if reply.stages is None else {"stages_ns": reply.stages}
            details = {"busy_s": busy_s, **said, **asdict(reply.call)}
            self.stats.traced("call", call_name(reply.call), reply.began, arrived, **details)
        return payload, arrived

    def _payload(self, tensor: torch.Tensor) -> memoryview:
        """The tensor's own bytes if they can go as they are, otherwise a copy made right where it is sent from."""
        wire = self._wire if tensor.dtype.is_floating_point else PlainFormat(tensor.dtype)
        if tensor.dtype == wire.dtype and tensor.is_contiguous():
            return tensor_bytes(tensor)
        place = self.reserve(wire.size(tuple(tensor.shape)))
        wire.write(tensor, place)
        return place

    def _payload_of(self, wanted: PendingReply[T]) -> memoryview:
        """Receive until ``wanted`` is here; replies to other calls wait with those who asked for them."""
        end = time.monotonic() + self.deadline_s
        while wanted.payload is None:
            self._receive(max(0.0, end - time.monotonic()))
        payload, wanted.payload = wanted.payload, None
        return payload

    def _receive(self, within_s: float) -> None:
        """The next reply, left with the call that it answers."""
        control, tensors = self.channel.receive(within_s)
        reply = decode_reply(control)
        asked = self._under_way.get(reply.id)
        if asked is None:
            raise ProtocolError(f"a reply from {self.channel.address} to call {reply.id}, which is not under way")
        done = self._done(reply)
        if len(tensors) > 1:
            raise ProtocolError(f"a reply with {len(tensors)} payloads")
        del self._under_way[reply.id]
        asked.payload = tensors[0] if tensors else memoryview(b"")
        asked.busy_ns = done.busy_ns
        asked.stages = done.stages if isinstance(done, StagedDone) else None

    def _done(self, reply: Reply) -> Done:
        if not isinstance(reply, Done):
            raise WorkerFailed(f"the {self._role} at {self.channel.address} failed: {printable(reply.reason)}")
        return reply

    def _handshake(self, hello: Hello, within_s: float) -> Welcome:
        self.channel.send(Frames(encode(hello)))
        control, tensors = self.channel.receive(within_s)  # it may still be reading its weights
        answer = decode_handshake(control)
        if tensors:
            raise ProtocolError("a handshake with payloads")
        where = f"the {self._role} at {self.channel.address}"
        if answer.version != hello.version:
            raise ProtocolError(
                f"{where} speaks protocol {answer.version}, this side {hello.version}: upgrade the older"
            )
        if not isinstance(answer, Welcome):
            raise ModelMismatch(f"{where} refused: {printable(answer.reason)}")
        groups = tuple(
            GroupShape(group.name, group.in_features, self.shard.width(group))
            for group in self.shard.groups(self.config)
        )
        shapes = tuple(msgspec.structs.replace(group, digest=None) for group in answer.groups)
        digests = {group.name: group.digest for group in answer.groups}
        same_weights = self._digests is None or digests == self._digests
        if answer.fingerprint == hello.fingerprint and answer.shard != said(self.shard, self.config):
            raise ModelMismatch(f"{where} holds {_held(answer.shard)}, not {_held(said(self.shard, self.config))}")
        if answer.fingerprint != hello.fingerprint or shapes != groups or not same_weights:
            raise ModelMismatch(f"{where} holds another model: start it with the model of this side")
        if numeric_path(answer.dtype) != hello.path:  # to be fast, or private, or measured: never another run
            raise ModelMismatch(f"{where} computes in {answer.dtype}, the {hello.path} path was asked for: upgrade it")
        return answer

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _die(self, error: ChannelError) -> None:
        self._dead = self._dead or error
        self._under_way.clear()  # each of them has this session
        self.channel.close()


class PendingReply(NotKept, Generic[T]):
    """A call under way, and its reply once it is here; see ``Pending``. ``read`` makes the product of its bytes."""

    def __init__(
        self,
        session: WorkerSession,
        kind: CallKind,
        call: Call,
        reply_bytes: int,
        read: Callable[[memoryview], T],
        began: float,
    ) -> None:
        self.kind: CallKind = kind
        self.call = call
        self.reply_bytes = reply_bytes
        self.read = read
        self.began = began
        self.payload: memoryview | None = None  # from its arrival until it is taken
        self.busy_ns = 0
        self.stages: tuple[Stage, Stage, Stage] | None = None  # as the worker says
        self._session = session

    def wait(self) -> T:
        """The product; over shm the worker can still change bytes. Raises any ChannelError. Called once."""
        return self._session.finish(self)


def _of_a_ping(keys: Sequence[GroupKey]) -> GroupKey:
    """A small group of those that a worker has: ``o`` of its first layer, or the LM head where it has no layer."""
    return next((key for key in keys if key[0] == "o"), keys[0])


def _held(shard: str | None) -> str:
    return "the whole model" if shard is None else f"shard {shard}"


def _as_it_is(product: memoryview) -> memoryview:
    return product


def call_name(call: Call) -> str:
    """What a call is, for a person: the linear group, or the kind of the message."""
    return call.group if isinstance(call, Linear | Product | MultiplyPads) else str(type(call).__struct_config__.tag)
