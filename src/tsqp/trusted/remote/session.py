"""The trusted side of one connection: handshake, calls in flight, replies checked for size, statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import torch
from msgspec.structs import asdict

from tsqp.config.dtype import DtypeName, NumericPath, WireDtype, numeric_path
from tsqp.config.groups import GroupName, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.errors import ChannelClosed, ChannelError, ModelMismatch, ProtocolError, ReplyShapeError, WorkerFailed
from tsqp.model.meter import CallKind
from tsqp.trusted.stats import Stats
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.codec import decode_handshake, decode_reply, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Call, Done, GroupShape, Hello, Linear, MultiplyPads, Product, Welcome
from tsqp.wire.payload import TORCH_DTYPES, PlainFormat, bytes_tensor, tensor_bytes, wire_format
from tsqp.wire.printable import printable


class WorkerSession:
    """Calls to one worker. Any error ends it: the channel is closed and every later call raises.

    ``wire_dtype`` is the format of float payloads, ``dtype`` the one results are handed out in. ``deadline_s`` bounds
    the wait for each reply. ``role``: what errors call the other side.
    """

    def __init__(
        self,
        channel: Channel,
        spec: ModelConfig,
        fingerprint: str,
        *,
        wire_dtype: WireDtype,
        dtype: DtypeName,
        stats: Stats,
        deadline_s: float,
        path: NumericPath = "float",
        digests: Mapping[GroupName, str] | None = None,
        role: Literal["worker", "dealer"] = "worker",
    ) -> None:
        self.channel = channel
        self.spec = spec
        self.stats = stats
        self._digests = digests
        self._role = role
        self._wire = wire_format(wire_dtype)
        self._dtype = TORCH_DTYPES[dtype]
        self._deadline_s = deadline_s
        self._next_id = 0
        self._waiting: set[int] = set()
        self._arrived: dict[int, memoryview] = {}
        self._busy_ns: dict[int, int] = {}
        self._dead: ChannelError | None = None
        try:
            self.welcome = self._handshake(Hello(PROTOCOL_VERSION, fingerprint, wire_dtype, path))
        except ChannelError:
            channel.close()
            raise

    def next_id(self) -> int:
        """A call id that no earlier call of this session had."""
        self._next_id += 1
        return self._next_id

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

    def input(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of the compute dtype for the input of a call; where that is the wire dtype it is not copied."""
        if self._wire.dtype != self._dtype:
            return torch.empty(shape, dtype=self._dtype)
        return bytes_tensor(self.reserve(self._wire.size(shape)), self._dtype, shape)

    def start(
        self, kind: CallKind, call: Call, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]
    ) -> PendingReply:
        """Send one call; ``shape`` is that of its product. Integer tensors go as they are, others as the wire dtype.

        Raises the session's first ChannelError when it is dead, WorkerLost, ProtocolError.
        """
        self._raise_if_dead()
        began = time.perf_counter()
        payloads = [self._payload(tensor) for tensor in tensors]
        return PendingReply(self, self._send(kind, call, payloads, self._wire.size(shape), began), shape)

    def ask(self, kind: CallKind, call: Call, payload: memoryview, reply_bytes: int) -> PendingBytes:
        """Send one call with one payload as it is; its product is ``reply_bytes`` of the worker's.

        Raises the session's first ChannelError when it is dead, WorkerLost, ProtocolError.
        """
        self._raise_if_dead()
        return self._send(kind, call, [payload], reply_bytes, time.perf_counter())

    def fail(self, error: ChannelError) -> None:
        """End the session: every later call raises ``error``, or what has ended it before."""
        self._die(error)

    def _send(
        self, kind: CallKind, call: Call, payloads: Sequence[memoryview], reply_bytes: int, began: float
    ) -> PendingBytes:
        row = self.stats.calls[kind]
        control = encode(call)
        serialised = time.perf_counter()
        try:
            self.channel.send(Frames(control, payloads), reply_bytes)
        except ChannelError as error:
            self._die(error)
            raise
        sent = time.perf_counter()
        self._waiting.add(call.id)
        row.count += 1
        row.held_s += sent - began
        row.serialise_s += serialised - began
        row.bytes_sent += len(control) + sum(payload.nbytes for payload in payloads)
        self.stats.traced("line", "send", began, sent, id=call.id)
        return PendingBytes(self, kind, call, reply_bytes, began)

    def close(self) -> None:
        """End the session. Closing twice is allowed."""
        self._dead = self._dead or ChannelClosed(f"the session with the {self._role} was closed")
        self.channel.close()

    def finish(self, reply: PendingReply) -> torch.Tensor:
        """Wait for one reply and hand out its product. Raises any ChannelError, and ends the session with it.

        Over shm the product may lie in memory that the worker can still change: read each element once.
        """
        payload = self.take(reply.bytes)
        arrived = time.perf_counter()
        product = self._wire.read(payload, reply.shape, self._dtype)
        end = time.perf_counter()
        row = self.stats.calls[reply.bytes.kind]
        row.deserialise_s += end - arrived
        row.rpc_s += end - arrived
        row.held_s += end - arrived
        self.stats.traced("line", "take", arrived, end)
        return product

    def take(self, reply: PendingBytes) -> memoryview:
        """Wait for one reply; the bytes of its product, of the size asked for. See ``finish``."""
        self._raise_if_dead()
        waits = time.perf_counter()
        try:
            payload = self._payload_of(reply.call.id)
            if payload.nbytes != reply.reply_bytes:
                raise ReplyShapeError(reply.reply_bytes, payload.nbytes)
        except ChannelError as error:
            self._die(error)
            raise
        arrived = time.perf_counter()
        row = self.stats.calls[reply.kind]
        row.rpc_s += arrived - reply.began
        row.held_s += arrived - waits
        row.bytes_received += payload.nbytes
        # Whatever the worker says, it cannot have computed for longer than the call was under way.
        busy_s = min(self._busy_ns.pop(reply.call.id) * 1e-9, arrived - reply.began)
        row.worker_s += busy_s
        self.stats.traced("line", "wait", waits, arrived)
        self.stats.traced("call", call_name(reply.call), reply.began, arrived, busy_s=busy_s, **asdict(reply.call))
        return payload

    def _payload(self, tensor: torch.Tensor) -> memoryview:
        """The tensor's own bytes if they can go as they are, otherwise a copy made right where it is sent from."""
        wire = self._wire if tensor.dtype.is_floating_point else PlainFormat(tensor.dtype)
        if tensor.dtype == wire.dtype and tensor.is_contiguous():
            return tensor_bytes(tensor)
        place = self.reserve(wire.size(tuple(tensor.shape)))
        wire.write(tensor, place)
        return place

    def _payload_of(self, call_id: int) -> memoryview:
        """Receive until the reply to ``call_id`` is here; replies to other calls wait for their turn."""
        end = time.monotonic() + self._deadline_s
        while call_id not in self._arrived:
            control, tensors = self.channel.receive(max(0.0, end - time.monotonic()))
            reply = decode_reply(control)
            if reply.id not in self._waiting:
                raise ProtocolError(f"a reply from {self.channel.address} to call {reply.id}, which is not under way")
            if not isinstance(reply, Done):
                raise WorkerFailed(f"the {self._role} at {self.channel.address} failed: {printable(reply.reason)}")
            if len(tensors) > 1:
                raise ProtocolError(f"a reply with {len(tensors)} payloads")
            self._waiting.remove(reply.id)
            self._arrived[reply.id] = tensors[0] if tensors else memoryview(b"")
            self._busy_ns[reply.id] = reply.busy_ns
        return self._arrived.pop(call_id)

    def _handshake(self, hello: Hello) -> Welcome:
        self.channel.send(Frames(encode(hello)))
        control, tensors = self.channel.receive(self._deadline_s)  # it may still be reading its weights
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
            GroupShape(group.name, group.in_features, group.out_features) for group in linear_groups(self.spec).values()
        )
        shapes = tuple(msgspec.structs.replace(group, digest=None) for group in answer.groups)
        digests = {group.name: group.digest for group in answer.groups}
        same_weights = self._digests is None or digests == self._digests
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
        self.channel.close()


class PendingBytes:
    """A call under way whose product is wanted as bytes."""

    def __init__(self, session: WorkerSession, kind: CallKind, call: Call, reply_bytes: int, began: float) -> None:
        self.kind: CallKind = kind
        self.call = call
        self.reply_bytes = reply_bytes
        self.began = began
        self._session = session

    def wait(self) -> memoryview:
        """The product's bytes; over shm the worker can still change them. Raises any ChannelError."""
        return self._session.take(self)


class PendingReply:
    """A call under way; see ``Pending``."""

    def __init__(self, session: WorkerSession, reply: PendingBytes, shape: tuple[int, ...]) -> None:
        self.bytes = reply
        self.shape = shape
        self._session = session

    def wait(self) -> torch.Tensor:
        return self._session.finish(self)


def call_name(call: Call) -> str:
    """What a call is, for a person: the linear group, or the kind of the message."""
    return call.group if isinstance(call, Linear | Product | MultiplyPads) else str(type(call).__struct_config__.tag)
