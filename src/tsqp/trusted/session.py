"""The trusted side of one connection: handshake, calls in flight, replies checked for size, statistics."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from tsqp.errors import ChannelClosed, ChannelError, ModelMismatch, ProtocolError, ReplyShapeError, WorkerFailed
from tsqp.model.payload import TORCH_DTYPES, bytes_tensor, tensor_bytes
from tsqp.spec.dtype import DtypeName
from tsqp.spec.groups import linear_groups
from tsqp.spec.model import ModelSpec
from tsqp.trusted.stats import CallKind, Stats
from tsqp.wire.channel import Channel, Frames
from tsqp.wire.codec import decode_handshake, decode_reply, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Call, Done, GroupShape, Hello, Welcome

HANDSHAKE_DEADLINE_S = 30.0


class WorkerSession:
    """Calls to one worker. Any error ends it: the channel is closed and every later call raises.

    ``wire_dtype`` is the format of float payloads, ``dtype`` the one results are handed out in. ``deadline_s`` bounds
    the wait for each reply.
    """

    def __init__(
        self,
        channel: Channel,
        spec: ModelSpec,
        fingerprint: str,
        *,
        wire_dtype: DtypeName,
        dtype: DtypeName,
        stats: Stats,
        deadline_s: float,
    ) -> None:
        self.channel = channel
        self.spec = spec
        self.stats = stats
        self._wire_dtype = TORCH_DTYPES[wire_dtype]
        self._dtype = TORCH_DTYPES[dtype]
        self._deadline_s = deadline_s
        self._next_id = 0
        self._waiting: set[int] = set()
        self._arrived: dict[int, memoryview] = {}
        self._dead: ChannelError | None = None
        try:
            self.welcome = self._handshake(Hello(PROTOCOL_VERSION, fingerprint, wire_dtype))
        except ChannelError:
            channel.close()
            raise

    def next_id(self) -> int:
        """A call id that no earlier call of this session had."""
        self._next_id += 1
        return self._next_id

    def start(
        self, kind: CallKind, call: Call, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]
    ) -> PendingReply:
        """Send one call; ``shape`` is that of its product. Integer tensors go as they are, others as the wire dtype.

        Raises the session's first ChannelError when it is dead, WorkerLost, ProtocolError.
        """
        self._raise_if_dead()
        row = self.stats.calls[kind]
        began = time.perf_counter()
        payloads = [tensor_bytes(self._to_wire(tensor)) for tensor in tensors]
        control = encode(call)
        serialised = time.perf_counter()
        try:
            self.channel.send(Frames(control, payloads))
        except ChannelError as error:
            self._die(error)
            raise
        self._waiting.add(call.id)
        row.count += 1
        row.serialise_s += serialised - began
        row.bytes_sent += len(control) + sum(payload.nbytes for payload in payloads)
        return PendingReply(self, kind, call.id, shape, began)

    def close(self) -> None:
        """End the session. Closing twice is allowed."""
        self._dead = self._dead or ChannelClosed("the session with the worker was closed")
        self.channel.close()

    def finish(self, reply: PendingReply) -> torch.Tensor:
        """Wait for one reply and hand out its product. Raises any ChannelError, and ends the session with it."""
        self._raise_if_dead()
        try:
            payload = self._payload_of(reply.call_id)
            expected = math.prod(reply.shape) * self._wire_dtype.itemsize
            if payload.nbytes != expected:
                raise ReplyShapeError(expected, payload.nbytes)
        except ChannelError as error:
            self._die(error)
            raise
        arrived = time.perf_counter()
        product = bytes_tensor(payload, self._wire_dtype, reply.shape).to(self._dtype)
        row = self.stats.calls[reply.kind]
        row.deserialise_s += time.perf_counter() - arrived
        row.rpc_s += time.perf_counter() - reply.began
        row.bytes_received += payload.nbytes
        return product

    def _to_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point:
            tensor = tensor.to(self._wire_dtype)
        return tensor.contiguous()

    def _payload_of(self, call_id: int) -> memoryview:
        """Receive until the reply to ``call_id`` is here; replies to other calls wait for their turn."""
        while call_id not in self._arrived:
            control, tensors = self.channel.receive(self._deadline_s)
            reply = decode_reply(control)
            if reply.id not in self._waiting:
                raise ProtocolError(f"a reply from {self.channel.address} to call {reply.id}, which is not under way")
            if not isinstance(reply, Done):
                raise WorkerFailed(f"the worker at {self.channel.address} failed: {printable(reply.reason)}")
            if len(tensors) != 1:
                raise ProtocolError(f"a reply with {len(tensors)} payloads where 1 was expected")
            self._waiting.remove(reply.id)
            self._arrived[reply.id] = tensors[0]
        return self._arrived.pop(call_id)

    def _handshake(self, hello: Hello) -> Welcome:
        self.channel.send(Frames(encode(hello)))
        control, tensors = self.channel.receive(HANDSHAKE_DEADLINE_S)
        answer = decode_handshake(control)
        if tensors:
            raise ProtocolError("a handshake with payloads")
        where = f"the worker at {self.channel.address}"
        if not isinstance(answer, Welcome):
            raise ModelMismatch(f"{where} refused: {printable(answer.reason)}")
        if answer.version != hello.version:
            raise ProtocolError(f"{where} speaks protocol {answer.version}, this side {hello.version}")
        groups = tuple(
            GroupShape(group.name, group.in_features, group.out_features) for group in linear_groups(self.spec).values()
        )
        if answer.fingerprint != hello.fingerprint or answer.groups != groups:
            raise ModelMismatch(f"{where} holds another model: start it with the same --model as this side")
        return answer

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _die(self, error: ChannelError) -> None:
        self._dead = error
        self.channel.close()


class PendingReply:
    """A call under way; see ``Pending``."""

    def __init__(
        self, session: WorkerSession, kind: CallKind, call_id: int, shape: tuple[int, ...], began: float
    ) -> None:
        self.kind: CallKind = kind
        self.call_id = call_id
        self.shape = shape
        self.began = began
        self._session = session

    def wait(self) -> torch.Tensor:
        return self._session.finish(self)


def printable(text: str) -> str:
    """A worker's words, safe for a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)
