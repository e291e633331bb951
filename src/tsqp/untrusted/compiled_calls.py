"""Calls that come again, answered by one compiled loop, with threads of its own; see ``call_loops.py``.

``Worker.answer`` is the plain way, of which the loop is a part: it begins with a call that was prepared there, and a
packet that it does not know goes there. Between two of its turns, which are short, Python looks after the other
connections, those who come and go, and signals.
"""

from __future__ import annotations

from threading import Thread

import numpy as np
import torch

from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.jit import Loop
from tsqp.model.linear import LinearWeights
from tsqp.untrusted import call_loops
from tsqp.untrusted import product_loops as loops
from tsqp.untrusted.paths.call_table import CallTable
from tsqp.untrusted.paths.field import FieldWorkerWeights
from tsqp.untrusted.store import PathWeights
from tsqp.wire import answering
from tsqp.wire.channel import Arrival, DirectCalls, Listener
from tsqp.wire.direct import done_start, put_line

MESSAGES = 128  # of one turn: a turn of Python between two of them costs as much as two calls
TURN_S = 0.02  # of one turn, if its products are long: others, and who wants to stop it, wait no longer than that


class Crew:
    """Threads that share a product's columns, the caller's among them: as many as torch uses."""

    def __init__(self, threads: int | None = None) -> None:
        self.state = np.zeros(loops.CREW_NUMBERS, np.int64)
        self._room = np.empty(0, np.uint8)
        loops.set_up(self.state)
        others = (torch.get_num_threads() if threads is None else threads) - 1
        self.state[loops.HELPERS] = others
        names = [f"tsqp-products-{number + 1}" for number in range(others)]
        self._threads = [Thread(target=loops.helper, args=(self.state,), name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def make_room(self, digit_bytes: int) -> None:
        """Have room for the digits of a product."""
        if len(self._room) < digit_bytes:
            self._room = np.empty(digit_bytes, np.uint8)
            self.state[loops.ROOM] = self._room.ctypes.data

    def close(self) -> None:
        """End the threads. Closing twice is allowed."""
        if self._threads:
            loops.stop(self.state)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


class CompiledCalls:
    """Serves connections for a worker, one at a time."""

    def __init__(self) -> None:
        self._crew: Crew | None = None
        self._line = np.zeros(answering.LISTENING_NUMBERS, np.int64)
        self._packet = np.empty(0, np.uint8)
        self._room = done_start(), np.zeros(answering.ANSWER_BYTES, np.uint8), np.zeros(2, np.int64)

    def prepare(self, weights: PathWeights) -> None:
        """Compile what calls of these weights need, so that no call waits for it."""
        loops_needed = loops_for(weights)
        for loop in loops_needed:
            loops.address_of(loop)
        if loops_needed:
            self.start()

    def start(self) -> None:
        """Compile what every call needs, and start the threads. Starting twice is allowed."""
        if self._crew is None:
            self._crew = Crew()
            self._turn(self._crew, CallTable(), messages=0)

    def serve(self, listener: Listener, peer: bytes, table: CallTable) -> Arrival | None:
        """Answer the calls of a connection that are in its table, until others are here, or nothing comes.

        What has come from it that is not in the table is returned, for the caller to answer.
        """
        crew = self._crew
        if crew is None or not len(table):
            return None
        while (calls := listener.direct(peer)) is not None:
            self._listen_to(calls)
            crew.make_room(table.digit_bytes)
            why, size = self._turn(crew, table, MESSAGES)
            if why == call_loops.CAME:
                return calls.received(self._packet[:size].tobytes())
            if why == call_loops.IDLE:
                return None
        return None

    def close(self) -> None:
        """End its threads. Closing twice is allowed."""
        if self._crew is not None:
            self._crew.close()

    def _listen_to(self, calls: DirectCalls) -> None:
        if calls.packet_bytes > len(self._packet):
            self._packet = np.zeros(calls.packet_bytes, np.uint8)
        put_line(self._line, calls)
        self._line[answering.BELL] = calls.bell

    def _turn(self, crew: Crew, table: CallTable, messages: int) -> tuple[int, int]:
        """One turn of the loop: why it has ended, and the size of what lies in the packet then."""
        room = self._packet, *self._room
        found = call_loops.serve(self._line, table.tables(), crew.state, room, messages, int(TURN_S * 1e9))
        return int(found[0]), int(found[1])


def loops_for(weights: PathWeights) -> list[Loop]:
    """Those of ``product_loops`` that products by these weights may have."""
    if isinstance(weights, FieldWorkerWeights):
        digits = any(isinstance(one.kernel, FewRowsKernel) for one in weights.groups.values())
        return [loops.split_loop, loops.digits_loop] if digits else []
    floats = any(isinstance(one, LinearWeights) and one.loops for one in weights.groups.values())
    return [loops.one_row_loop, loops.few_rows_loop] if floats else []
