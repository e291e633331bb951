"""Calls that come again, and how often the loop has given up waiting for one."""

from __future__ import annotations

import time

from tsqp.untrusted.compiled_calls import CompiledCalls
from tsqp.untrusted.paths.call_table import CallTable
from tsqp.wire.channel import Arrival, Listener
from tsqp.wire.exchange import PATIENCE_MS


class PatientCalls(CompiledCalls):
    """Counts in ``waited`` how often nothing came for as long as the loop has patience.

    What comes next is answered in Python, though the loop knows it: on a machine that is busy, that is whatever a
    client sends after it has had no processor for a while. A loop that gives up sooner is not counted.
    """

    waited = 0

    def serve(self, listener: Listener, peer: bytes, table: CallTable) -> Arrival | None:
        """See ``CompiledCalls``."""
        began = time.monotonic()
        arrival = super().serve(listener, peer, table)
        self.waited += arrival is None and time.monotonic() - began >= PATIENCE_MS / 1000
        return arrival
