"""The worker: a loop that feeds messages to a pure answer function. It keeps nothing of a call once it is answered."""

from __future__ import annotations

import logging

from tsqp.errors import ProtocolError
from tsqp.model.payload import DTYPE_NAMES_BY_TORCH, TORCH_DTYPES
from tsqp.spec.groups import linear_groups
from tsqp.untrusted.ops import Operators
from tsqp.untrusted.weights import WorkerWeights
from tsqp.wire.channel import Frames, Listener
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Call, Done, Failed, GroupShape, Hello, Refused, Welcome

MAX_CONNECTIONS = 4096

log = logging.getLogger("tsqp.worker")


class Worker:
    """Answers any number of connections from one set of weights."""

    def __init__(self, weights: WorkerWeights) -> None:
        self._weights = weights
        self._operators = {name: Operators(weights, dtype) for name, dtype in TORCH_DTYPES.items()}
        self._connections: dict[bytes, Operators] = {}  # those past the handshake, oldest first

    def serve(self, listener: Listener) -> None:
        """Answer until the listener is interrupted."""
        while not listener.interrupted:
            arrival = listener.receive(None)
            if arrival is None:
                continue
            answer = self.answer(arrival.peer, arrival.frames)
            if answer is not None:
                listener.send(arrival.peer, answer)

    def answer(self, peer: bytes, frames: Frames) -> Frames | None:
        """The answer to one message; None for bytes that are no message, which deserve none."""
        try:
            message = decode_to_worker(frames.control)
        except ProtocolError as error:
            log.warning("ignored a message: %s", error)
            return None
        if isinstance(message, Hello):
            return Frames(encode(self._greet(peer, message)))
        return self._compute(peer, message, frames)

    def _greet(self, peer: bytes, hello: Hello) -> Welcome | Refused:
        weights = self._weights
        if hello.version != PROTOCOL_VERSION:
            reason = f"it speaks protocol {PROTOCOL_VERSION}, not {hello.version}: upgrade the older side"
            return Refused(PROTOCOL_VERSION, weights.fingerprint, reason)
        if hello.fingerprint != weights.fingerprint:
            reason = (
                f"it holds another model (fingerprint {weights.fingerprint[:12]}, asked for {hello.fingerprint[:12]}): "
                "start both sides with the same --model"
            )
            return Refused(PROTOCOL_VERSION, weights.fingerprint, reason)
        self._connections[peer] = self._operators[hello.wire_dtype]
        if len(self._connections) > MAX_CONNECTIONS:  # transports do not report ended connections
            del self._connections[next(iter(self._connections))]
        groups = tuple(
            GroupShape(group.name, group.in_features, group.out_features)
            for group in linear_groups(weights.spec).values()
        )
        dtype = DTYPE_NAMES_BY_TORCH[weights.dtype]
        return Welcome(PROTOCOL_VERSION, weights.fingerprint, groups, str(weights.device), dtype)

    def _compute(self, peer: bytes, call: Call, frames: Frames) -> Frames:
        operators = self._connections.get(peer)
        if operators is None:
            return Frames(encode(Failed(call.id, "no handshake was made on this connection")))
        try:
            return Frames(encode(Done(call.id)), (operators(call, frames.tensors),))
        except (ProtocolError, RuntimeError, MemoryError) as error:  # torch reports lack of memory as RuntimeError
            log.warning("call %d failed: %s", call.id, error)
            return Frames(encode(Failed(call.id, str(error).splitlines()[0][:500])))
