"""The worker: a loop that feeds messages to ``answer`` and sends what ``answer`` returns.

The worker keeps an entry for each connection past its handshake. At the ``layer`` partition that entry holds KV caches
and hidden states, which outlive a call; at the other partitions nothing of a call outlives its answer.
"""

from __future__ import annotations

import logging
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from tsqp.config.dtype import NumericPath
from tsqp.config.shard import Shard, said, whole
from tsqp.errors import DeviceError, ProtocolError, TsqpError
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import NOTHING_QUEUED
from tsqp.untrusted.compiled_calls import CompiledCalls
from tsqp.untrusted.paths.field import FieldOperators
from tsqp.untrusted.paths.many import ManyOperators
from tsqp.untrusted.paths.many_weights import ManyWeights
from tsqp.untrusted.paths.plain import Operators
from tsqp.untrusted.pipeline import Pipeline, UnderWay
from tsqp.untrusted.store import PathWeights, Store
from tsqp.wire.channel import Arrival, Departure, Frames, Listener
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.device_memory import Payload
from tsqp.wire.messages import (
    PROTOCOL_VERSION,
    Begin,
    Call,
    Done,
    Failed,
    Finish,
    GroupShape,
    Hello,
    Layer,
    Refused,
    StagedDone,
    ToWorker,
    Welcome,
)

MAX_GREETED = 4096  # connections past the handshake
MAX_STATEFUL_CONNECTIONS = 8  # with KV caches here; each is bounded too

log = logging.getLogger("tsqp.worker")


class Worker:
    """Answers any number of connections from one checkpoint's weights.

    ``calls`` answers those that come again, where the transport lets it; without it this is done like all else.
    """

    def __init__(self, store: Store, calls: CompiledCalls | None = None) -> None:
        self._store = store
        self._backend = store.backend
        self._calls = calls
        self._ended_ns = 0  # when the last call ended
        self._lost: str | None = None  # why the device does nothing any more
        # Those past the handshake, the longest silent first.
        self._connections: dict[bytes, Operators | FieldOperators | ManyOperators] = {}

    def prepare(self, path: NumericPath) -> PathWeights | ManyWeights:
        """Read the weights of a path, if it has not been asked for before, and compile. Raises CheckpointError."""
        weights = self._store.prepare(path)
        if self._calls is not None and not isinstance(weights, ManyWeights):
            self._calls.prepare(weights)
        return weights

    def serve(self, listener: Listener) -> None:
        """Answer until the listener is interrupted. Raises DeviceError once the device has failed for good."""
        with torch.inference_mode(), self._backend.serving():  # once: each call would pay for it
            if self._backend.depth > 1:
                self._serve_together(listener)
                return
            while not listener.interrupted:
                event = self._received(listener, None)
                while isinstance(event, Arrival) and (answer := self.answer(event)) is not None:
                    send_answer(listener, event, answer)
                    event = self._repeated(listener, event.peer)
                if isinstance(event, Departure):
                    self._let_go(event.peer)

    def _serve_together(self, listener: Listener) -> None:
        """The same with calls under way together."""
        pipeline = Pipeline(partial(send_answer, listener), self._end, self._backend.depth)
        while not listener.interrupted:
            event = self._received(listener, 0.0 if len(pipeline) else None)
            if isinstance(event, Arrival):
                self._enter(pipeline, listener, event)
            elif isinstance(event, Departure):
                pipeline.drain()
                self._let_go(event.peer)
            pipeline.look()
            if self._lost is not None:
                pipeline.drain()
                raise DeviceError(f"{self._lost}, so every call would fail: start the worker again")
        pipeline.drain()

    def _received(self, listener: Listener, timeout_s: float | None) -> Arrival | Departure | None:
        event = listener.receive(timeout_s)
        if isinstance(event, Arrival) and (memory := listener.memory(event.peer)) is not None:
            self._backend.attach(event.peer, memory)
        return event

    def _enter(self, pipeline: Pipeline, listener: Listener, arrival: Arrival) -> None:
        """Begin a call behind those that are under way. What is no call is answered alone."""
        call = self._decoded(arrival)
        if call is None:
            return
        if isinstance(call, Hello):
            pipeline.drain()  # weights may be read, which takes the memory that calls hold
            listener.send(arrival, Frames(encode(self._greet(arrival.peer, call))))
            return
        pipeline.make_room()
        begun = self._begin(call, arrival)
        alone = not len(pipeline) or isinstance(call, Begin | Layer | Finish)
        if isinstance(begun, UnderWay) and begun.full and not alone:
            with suppress(RuntimeError):
                begun.queued.wait()  # it gets no answer yet: there may be room for it once the others are done
            pipeline.drain()
            self._backend.trim()
            begun = self._begin(call, arrival)
        pipeline.add(arrival, begun)
        if arrival.device is not None:
            pipeline.drain()  # before its connection can end: the listener closes its memory, used or not

    def _let_go(self, peer: bytes) -> None:
        """A connection has ended, and all its calls."""
        operators = self._connections.pop(peer, None)
        self._backend.detach(peer)
        del operators  # not before the device is done with it
        self._backend.trim()

    def _repeated(self, listener: Listener, peer: bytes) -> Arrival | None:
        """Answer what a connection repeats from here on; what came then that it does not repeat, if anything."""
        operators = self._connections.get(peer)
        if self._calls is None or operators is None:
            return None
        return self._calls.serve(listener, peer, operators.prepared.table)

    def answer(self, arrival: Arrival) -> Frames | None:
        """The answer to one message; None for bytes that are no message, which deserve none."""
        message = self._decoded(arrival)
        if message is None:
            return None
        if isinstance(message, Hello):
            return Frames(encode(self._greet(arrival.peer, message)))
        begun = self._begin(message, arrival)
        return begun if isinstance(begun, Frames) else self._end(begun)

    def _decoded(self, arrival: Arrival) -> ToWorker | None:
        try:
            return decode_to_worker(arrival.frames.control)
        except ProtocolError as error:
            log.warning("ignored a message: %s", error)
            return None

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
        except Exception as error:  # also of a disk: it is about this client's path, and no other's
            reason, full = self._failed(f"the weights of the {hello.path} path", error)
            log.warning("the %s path cannot be served: %s", hello.path, reason)
        else:
            return self._welcome(peer, hello, weights)
        if full:
            self._backend.trim()  # only here does the error hold nothing of what was read any more
        return self._refused(reason)

    def _welcome(self, peer: bytes, hello: Hello, weights: PathWeights | ManyWeights) -> Welcome:
        self._connections.pop(peer, None)
        self._connections[peer] = self._store.operators(hello.path, hello.wire_dtype)
        if len(self._connections) > MAX_GREETED:  # ZeroMQ does not report ended connections
            del self._connections[next(iter(self._connections))]
        shapes, shard = group_shapes(weights), said(shard_of(weights), weights.config)
        return Welcome(PROTOCOL_VERSION, self._store.fingerprint, shapes, str(weights.device), weights.compute, shard)

    def _refused(self, reason: str) -> Refused:
        return Refused(PROTOCOL_VERSION, self._store.fingerprint, reason)

    def _begin(self, call: Call, arrival: Arrival) -> UnderWay | Frames:
        """Queue what a call asks for; the answer where nothing is left to wait for."""
        began = time.perf_counter_ns()
        operators = self._connections.pop(arrival.peer, None)
        if operators is None:
            return Frames(encode(Failed(call.id, "no handshake was made on this connection")))
        self._connections[arrival.peer] = operators
        product, failure, full = None, None, False
        try:
            tensors, reply = arrival.device or (arrival.frames.tensors, arrival.reply)
            product = operators(call, tensors, reply, arrival.place)
            self._bound_state()
        except Exception as error:  # whatever it is, it is this call's and ends no other
            failure, full = self._failed(described(call), error)
        try:  # also of a call that has failed: the client may use the memory again once it has the answer
            queued = self._backend.submit()
        except Exception as error:  # of a device that has failed, on which nothing is under way any more
            queued, (failure, full) = NOTHING_QUEUED, self._failed(described(call), error)
        if failure is None and queued is NOTHING_QUEUED:
            done = Done(call.id, time.perf_counter_ns() - began)
            return Frames(encode(done), _sent(product))
        return UnderWay(call, product, began, queued, failure, full)

    def _end(self, begun: UnderWay) -> Frames:
        """Wait for what a call has queued: its answer."""
        call, product, began, queued, failure, full = begun
        stages = None
        try:
            queued.wait()
            stages = queued.stages()
        except Exception as error:
            failure, full = self._failed(described(call), error)
        now = time.perf_counter_ns()
        began, self._ended_ns = max(began, self._ended_ns), now  # a device does one call after another
        if failure is None:
            done = Done(call.id, now - began) if stages is None else StagedDone(call.id, now - began, stages)
            return Frames(encode(done), _sent(product))
        log.warning("call %d failed: %s", call.id, failure)
        if full:
            self._backend.trim()  # no error holds anything of the call any more
        return Frames(encode(Failed(call.id, failure)))

    def _failed(self, what: str, error: Exception) -> tuple[str, bool]:
        """Why ``what`` was not to be had, and whether for lack of memory."""
        if self._backend.is_out_of_memory(error):
            return f"{self._backend.failed} is out of memory: there was no room for {what}", True
        if isinstance(error, RuntimeError):  # which the device may have raised
            self._see_whether_it_works(error)
        return reason_of(error), False

    def _see_whether_it_works(self, error: Exception) -> None:
        """Ask the device, after an error that it may keep, as CUDA keeps some.

        A worker that went on would greet clients and fail each of their calls, and whoever supervises it would have
        nothing to act on.
        """
        if self._lost is None and not self._backend.works():
            self._lost = f"{self._backend.failed} has failed for good ({reason_of(error)})"

    def _bound_state(self) -> None:
        """Forget the longest silent of too many connections with state: ZeroMQ does not say which have ended."""
        stateful = [peer for peer, operators in self._connections.items() if operators.keeps_state]
        if len(stateful) > MAX_STATEFUL_CONNECTIONS:
            del self._connections[stateful[0]]


def send_answer(listener: Listener, arrival: Arrival, answer: Frames) -> None:
    """Answer a message. What the line does not carry is a failure of that call, and nobody else's."""
    try:
        listener.send(arrival, answer)
    except ProtocolError as error:
        call = decode_to_worker(arrival.frames.control)
        if isinstance(call, Hello):
            raise  # a welcome of this worker's own making
        log.warning("call %d failed: %s", call.id, reason_of(error))
        listener.send(arrival, Frames(encode(Failed(call.id, reason_of(error)))))


def _sent(product: Payload | None) -> tuple[memoryview, ...]:
    """What an answer carries of a product; nothing where it is in its place already, in memory of the device."""
    return (product,) if isinstance(product, memoryview) else ()


def described(call: Call) -> str:
    """A call as a person reads of it, without anything that was sent in it but numbers of rows and names of groups."""
    words = [f"call {type(call).__struct_config__.tag}"]
    words += [f"{name} {getattr(call, name)}" for name in ("group", "layer", "rows", "blocks") if hasattr(call, name)]
    return ", ".join(words)


def shard_of(weights: PathWeights | ManyWeights) -> Shard:
    """What of the model they are: all of it, except on the field path."""
    return whole(weights.config) if isinstance(weights, ModelWeights) else weights.shard


def group_shapes(weights: PathWeights | ManyWeights) -> tuple[GroupShape, ...]:
    """The linear groups as a client is told of them, as wide as they are here, with digests on the field path."""
    digests = {} if isinstance(weights, ModelWeights) else weights.digests
    shard = shard_of(weights)
    return tuple(
        GroupShape(group.name, group.in_features, shard.width(group), digests.get(group.name))
        for group in shard.groups(weights.config)
    )


def reason_of(error: Exception) -> str:
    """One bounded line, for a person. Of a fault that nobody foresaw its place: its text may quote what was sent."""
    if not isinstance(error, TsqpError | RuntimeError | MemoryError):
        return f"a fault of the worker: {type(error).__name__} at {_place_of(error)}"
    return (str(error) or type(error).__name__).splitlines()[0][:500]


def _place_of(error: Exception) -> str:
    """File and line that an error was raised at."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in last) or "an unknown place"
