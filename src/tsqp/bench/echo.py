"""``python -m tsqp.bench.echo ADDRESS``: the server of ``bench rpc``. It inverts every byte that it is sent.

It stands where a worker stands: it reads its input where the transport left it and writes the product where the
transport wants it. A message without a tensor gets an answer without one. Over shm a ``Product`` is answered as a
worker answers it, first in Python and then, when it comes again, in the worker's own loop, but without multiplying.
Over cuda the device inverts, from the arena into the arena.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing

import torch

from tsqp.arith.row_threads import RowWork
from tsqp.cores import cores
from tsqp.errors import ProtocolError
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.device import backend_for
from tsqp.untrusted.compiled_calls import CompiledCalls
from tsqp.untrusted.paths.call_table import CallTable
from tsqp.wire.channel import Arrival, Frames, Listener
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.messages import Done, Product
from tsqp.wire.transport import listen

NO_WORK = RowWork(lambda: None, 0, (), 0)


def serve(listener: Listener, calls: CompiledCalls | None = None, backend: Backend | None = None) -> None:
    """Answer until the listener is interrupted; ``calls`` answers products that come again, ``backend`` on a device."""
    while not listener.interrupted:
        arrival = listener.receive(None)
        while isinstance(arrival, Arrival):
            call = product_in(arrival) if calls is not None else None
            if calls is None or call is None:
                listener.send(arrival, answer(arrival) if backend is None else answer_on_device(arrival, backend))
                break
            listener.send(arrival, Frames(encode(Done(call.id))))
            table = CallTable()
            table.add(arrival.place, call, NO_WORK)
            arrival = calls.serve(listener, arrival.peer, table)


def product_in(arrival: Arrival) -> Product | None:
    """The product that a message asks for; None for another message."""
    try:
        call = decode_to_worker(arrival.frames.control)
    except ProtocolError:
        return None
    return call if isinstance(call, Product) else None


def answer(arrival: Arrival) -> Frames:
    """The same number of tensors back, every byte inverted in one pass from the input to the product."""
    if not arrival.frames.tensors:
        return Frames(arrival.frames.control)
    (payload,) = arrival.frames.tensors
    product = memoryview(bytearray(payload.nbytes)) if arrival.reply is None else arrival.reply
    torch.bitwise_not(_words(payload), out=_words(product))
    return Frames(arrival.frames.control, (product,))


def answer_on_device(arrival: Arrival, backend: Backend) -> Frames:
    """The same for tensors on a device, over which ``backend`` computes."""
    tensors, reply = arrival.device or ((), None)
    if tensors:
        shape = (tensors[0].nbytes // 8,)
        torch.bitwise_not(
            backend.stage_in(tensors[0], torch.int64, shape), out=backend.place(reply, torch.int64, shape)
        )
        backend.settle()
    return Frames(arrival.frames.control)


def _words(payload: memoryview) -> torch.Tensor:
    return torch.frombuffer(payload, dtype=torch.int64)


def main() -> None:
    """Listen, say where, answer until standard input ends."""
    torch.set_num_threads(cores())
    with closing(listen(sys.argv[1], watch_fd=sys.stdin.fileno())) as listener, ExitStack() as stack:
        calls = None
        if listener.address.startswith("shm:"):
            calls = stack.enter_context(closing(CompiledCalls()))
            calls.start()
        backend = None
        if listener.address.startswith("cuda:"):
            backend = backend_for(torch.device("cuda", 0))
            stack.enter_context(backend.serving())
        print(json.dumps({"address": listener.address}), flush=True)  # noqa: T201
        serve(listener, calls, backend)


if __name__ == "__main__":
    main()
