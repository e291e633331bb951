"""``python -m tsqp.bench.waiting MODEL ADDRESS MILLISECONDS``: a worker that waits instead of computing.

It holds no weights. It greets as a worker of MODEL, and answers every linear call with zeros after the wait, one call
at a time, in the order they came. So a machine whose cores are shared can show what overlap a pipeline reaches.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing

from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import WireDtype, payload_bytes
from tsqp.config.groups import linear_groups
from tsqp.errors import ProtocolError
from tsqp.wire.channel import Arrival, Frames, Listener
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Done, GroupShape, Hello, Linear, Welcome
from tsqp.wire.transport import listen


class WaitingWorker:
    """Answers with zeros, ``wait_s`` seconds after it took a call."""

    def __init__(self, checkpoint: Checkpoint, wait_s: float) -> None:
        self._groups = linear_groups(checkpoint.config)
        self._fingerprint = checkpoint.fingerprint()
        self._wait_s = wait_s
        self._wire_dtypes: dict[bytes, WireDtype] = {}
        self._zeros = bytes(0)

    def serve(self, listener: Listener) -> None:
        """Answer until the listener is interrupted."""
        while not listener.interrupted:
            arrival = listener.receive(None)
            if isinstance(arrival, Arrival):
                listener.send(arrival, self.answer(arrival))

    def answer(self, arrival: Arrival) -> Frames:
        """The answer to one message. Raises ProtocolError for a call other than a linear product."""
        message = decode_to_worker(arrival.frames.control)
        if isinstance(message, Hello):
            self._wire_dtypes[arrival.peer] = message.wire_dtype
            return Frames(encode(self._welcome(message)))
        if not isinstance(message, Linear):
            raise ProtocolError("the waiting worker knows linear products only: use partition linear")
        due = time.perf_counter() + self._wait_s
        first, end = self._groups[message.group].part_rows(message.part)
        product = self._zero_bytes(payload_bytes(self._wire_dtypes[arrival.peer], (message.rows, end - first)))
        if arrival.reply is not None:  # written in place now, so that sending costs no time after the wait
            arrival.reply[:] = product
            product = arrival.reply
        time.sleep(max(0.0, due - time.perf_counter()))
        return Frames(encode(Done(message.id, round(self._wait_s * 1e9))), (product,))

    def _welcome(self, hello: Hello) -> Welcome:
        shapes = tuple(GroupShape(g.name, g.in_features, g.out_features) for g in self._groups.values())
        return Welcome(PROTOCOL_VERSION, self._fingerprint, shapes, "cpu", hello.wire_dtype)

    def _zero_bytes(self, size: int) -> memoryview:
        if len(self._zeros) < size:
            self._zeros = bytes(size)
        return memoryview(self._zeros)[:size]


def main() -> None:
    """Listen, say where, answer until standard input ends."""
    model, address, wait_ms = sys.argv[1:]
    worker = WaitingWorker(open_checkpoint(model), float(wait_ms) / 1e3)
    with closing(listen(address, watch_fd=sys.stdin.fileno())) as listener:
        print(json.dumps({"address": listener.address}), flush=True)  # noqa: T201
        worker.serve(listener)


if __name__ == "__main__":
    main()
