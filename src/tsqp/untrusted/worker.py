"""The worker: a loop that feeds messages to ``answer`` and sends what ``answer`` returns.

The worker keeps an entry for each connection past its handshake. At the ``layer`` partition that entry holds KV caches
and hidden states, which outlive a call; at the other partitions nothing of a call outlives its answer.
"""

from __future__ import annotations

import logging
import time

import torch

from tsqp.config.dtype import NumericPath
from tsqp.config.groups import linear_groups
from tsqp.errors import ProtocolError, TsqpError
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.compiled_calls import CompiledCalls
from tsqp.untrusted.paths.field import FieldOperators, FieldWorkerWeights
from tsqp.untrusted.paths.plain import Operators
from tsqp.untrusted.store import PathWeights, WeightStore
from tsqp.wire.channel import Arrival, Departure, Frames, Listener
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Call, Done, Failed, GroupShape, Hello, Refused, Welcome
from tsqp.wire.payload import wire_format

MAX_GREETED = 4096  # connections past the handshake
MAX_STATEFUL_CONNECTIONS = 8  # with KV caches here; each is bounded too

log = logging.getLogger("tsqp.worker")


class Worker:
    """Answers any number of connections from one checkpoint's weights.

    ``calls`` answers those that come again, where the transport lets it; without it this is done like all else.
    """

    def __init__(self, store: WeightStore, calls: CompiledCalls | None = None) -> None:
        self._store = store
        self._backend = store.backend
        self._calls = calls
        # Those past the handshake, the longest silent first.
        self._connections: dict[bytes, Operators | FieldOperators] = {}

    def prepare(self, path: NumericPath) -> PathWeights:
        """Read the weights of a path, if it has not been asked for before, and compile. Raises CheckpointError."""
        weights = self._store.prepare(path)
        if self._calls is not None:
            self._calls.prepare(weights)
        return weights

    def serve(self, listener: Listener) -> None:
        """Answer until the listener is interrupted."""
        with torch.inference_mode(), self._backend.serving():  # once: each call would pay for it
            while not listener.interrupted:
                event = listener.receive(None)
                if isinstance(event, Departure):
                    self._connections.pop(event.peer, None)
                    self._backend.detach(event.peer)
                elif event is not None and (memory := listener.memory(event.peer)) is not None:
                    self._backend.attach(event.peer, memory)
                while isinstance(event, Arrival) and (answer := self.answer(event)) is not None:
                    listener.send(event, answer)
                    event = self._repeated(listener, event.peer)

    def _repeated(self, listener: Listener, peer: bytes) -> Arrival | None:
        """Answer what a connection repeats from here on; what came then that it does not repeat, if anything."""
        operators = self._connections.get(peer)
        if self._calls is None or operators is None:
            return None
        return self._calls.serve(listener, peer, operators.prepared.table)

    def answer(self, arrival: Arrival) -> Frames | None:
        """The answer to one message; None for bytes that are no message, which deserve none."""
        try:
            message = decode_to_worker(arrival.frames.control)
        except ProtocolError as error:
            log.warning("ignored a message: %s", error)
            return None
        if isinstance(message, Hello):
            return Frames(encode(self._greet(arrival.peer, message)))
        return self._compute(message, arrival)

    def _greet(self, peer: bytes, hello: Hello) -> Welcome | Refused:
        if hello.version != PROTOCOL_VERSION:
            reason = f"it speaks protocol {PROTOCOL_VERSION}, not {hello.version}: upgrade the older side"
            return self._refused(reason)
        fingerprint = self._store.fingerprint
        if hello.fingerprint != fingerprint:
            return self._refused(
                f"it holds another model (fingerprint {fingerprint[:12]}, asked for {hello.fingerprint[:12]}): "
                "start both sides with the same --model"
            )
        try:
            weights = self.prepare(hello.path)
        except (TsqpError, RuntimeError, MemoryError) as error:
            full = self._backend.is_out_of_memory(error)
            reason = self._no_room(f"the weights of the {hello.path} path") if full else reason_of(error)
            log.warning("the %s path cannot be served: %s", hello.path, reason)
        else:
            return self._welcome(peer, hello, weights)
        if full:
            self._backend.trim()  # only here does the error hold nothing of what was read any more
        return self._refused(reason)

    def _welcome(self, peer: bytes, hello: Hello, weights: PathWeights) -> Welcome:
        self._connections.pop(peer, None)
        self._connections[peer] = operators(weights, hello, self._backend)
        if len(self._connections) > MAX_GREETED:  # ZeroMQ does not report ended connections
            del self._connections[next(iter(self._connections))]
        return Welcome(
            PROTOCOL_VERSION, self._store.fingerprint, group_shapes(weights), str(weights.device), weights.compute
        )

    def _refused(self, reason: str) -> Refused:
        return Refused(PROTOCOL_VERSION, self._store.fingerprint, reason)

    def _compute(self, call: Call, arrival: Arrival) -> Frames:
        operators = self._connections.pop(arrival.peer, None)
        if operators is None:
            return Frames(encode(Failed(call.id, "no handshake was made on this connection")))
        self._connections[arrival.peer] = operators
        try:
            began = time.perf_counter_ns()
            try:
                product = operators(call, arrival.frames.tensors, arrival.reply, arrival.place)
            finally:
                self._backend.settle()  # the client may use the memory again once it has the answer
            self._bound_state()
            done = Done(call.id, time.perf_counter_ns() - began)
            return Frames(encode(done), () if product is None else (product,))
        except (ProtocolError, RuntimeError, MemoryError) as error:  # torch reports lack of memory as RuntimeError
            full = self._backend.is_out_of_memory(error)
            reason = self._no_room(described(call)) if full else reason_of(error)
            log.warning("call %d failed: %s", call.id, reason)
        if full:
            self._backend.trim()  # only here does the error hold nothing of the call any more
        return Frames(encode(Failed(call.id, reason)))

    def _no_room(self, what: str) -> str:
        return f"{self._backend.device} is out of memory: there was no room for {what}"

    def _bound_state(self) -> None:
        """Forget the longest silent of too many connections with state: ZeroMQ does not say which have ended."""
        stateful = [peer for peer, operators in self._connections.items() if operators.keeps_state]
        if len(stateful) > MAX_STATEFUL_CONNECTIONS:
            del self._connections[stateful[0]]


def operators(weights: PathWeights, hello: Hello, backend: Backend) -> Operators | FieldOperators:
    """What computes the calls of a connection that said ``hello``."""
    if isinstance(weights, FieldWorkerWeights):
        return FieldOperators(weights, backend)
    return Operators(weights, wire_format(hello.wire_dtype), backend)


def described(call: Call) -> str:
    """A call as a person reads of it, without anything that was sent in it but numbers of rows and names of groups."""
    words = [f"call {type(call).__struct_config__.tag}"]
    words += [f"{name} {getattr(call, name)}" for name in ("group", "layer", "rows", "blocks") if hasattr(call, name)]
    return ", ".join(words)


def group_shapes(weights: PathWeights) -> tuple[GroupShape, ...]:
    """The linear groups as a client is told of them, with their digests on the field path."""
    digests = weights.digests if isinstance(weights, FieldWorkerWeights) else {}
    return tuple(
        GroupShape(group.name, group.in_features, group.out_features, digests.get(group.name))
        for group in linear_groups(weights.config).values()
    )


def reason_of(error: Exception) -> str:
    """One bounded line, for a person."""
    return (str(error) or type(error).__name__).splitlines()[0][:500]
