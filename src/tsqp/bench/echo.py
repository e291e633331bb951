"""``python -m tsqp.bench.echo ADDRESS``: the server of ``bench rpc``. It inverts every byte that it is sent.

It stands where a worker stands: it reads its input where the transport left it and writes the product where the
transport wants it. A message without a tensor gets an answer without one.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing

import torch

from tsqp.cores import cores
from tsqp.wire.channel import Arrival, Frames, Listener
from tsqp.wire.transport import listen


def serve(listener: Listener) -> None:
    """Answer until the listener is interrupted."""
    while not listener.interrupted:
        arrival = listener.receive(None)
        if isinstance(arrival, Arrival):
            listener.send(arrival, answer(arrival))


def answer(arrival: Arrival) -> Frames:
    """The same number of tensors back, every byte inverted in one pass from the input to the product."""
    if not arrival.frames.tensors:
        return Frames(arrival.frames.control)
    (payload,) = arrival.frames.tensors
    product = memoryview(bytearray(payload.nbytes)) if arrival.reply is None else arrival.reply
    torch.bitwise_not(_words(payload), out=_words(product))
    return Frames(arrival.frames.control, (product,))


def _words(payload: memoryview) -> torch.Tensor:
    return torch.frombuffer(payload, dtype=torch.int64)


def main() -> None:
    """Listen, say where, answer until standard input ends."""
    torch.set_num_threads(cores())
    with closing(listen(sys.argv[1], watch_fd=sys.stdin.fileno())) as listener:
        print(json.dumps({"address": listener.address}), flush=True)  # noqa: T201
        serve(listener)


if __name__ == "__main__":
    main()
