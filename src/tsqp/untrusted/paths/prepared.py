"""Products of calls that come again with the same memory: checked once, bound to that memory, and run from then on."""

from __future__ import annotations

from tsqp.untrusted.backends.base import Key, Run
from tsqp.untrusted.paths.call_table import CallTable
from tsqp.wire.messages import Call, Linear, Product

MOST_ROWS = 16  # of decode steps: a prefill does not come again in the same memory, and has no time to gain
MOST = 4096  # of one connection, whose client may name what it likes


class Prepared:
    """The prepared products of one connection. ``table`` has those that compiled code can do."""

    def __init__(self) -> None:
        self._runs: dict[Key, Run] = {}
        self.table = CallTable()

    def run(self, call: Call, place: bytes) -> bool:
        """Do the product of a call whose tensors and reply are those of ``place``; False where none is prepared."""
        run = self._runs.get(key_of(call, place))
        if run is None:
            return False
        run()
        return True

    def wants(self, call: Call, place: bytes) -> bool:
        """Whether a call like this one can come again in the same memory."""
        return bool(place) and isinstance(call, Linear | Product) and call.rows <= MOST_ROWS

    def keep(self, call: Call, place: bytes, run: Run | None) -> None:
        """Have ``run`` do what the next call like this one asks for, where ``place`` names memory."""
        if run is not None and isinstance(call, Linear | Product) and self.wants(call, place):
            if len(self._runs) >= MOST:
                self._runs.clear()
                self.table.clear()
            self._runs[key_of(call, place)] = run
            self.table.add(place, call, run)


def key_of(call: Call, place: bytes) -> Key:
    """All that a product depends on but the bytes of its input: everything in the call except its id."""
    if isinstance(call, Product):
        return place, call.group, call.layer, call.rows, call.digits, Product
    if isinstance(call, Linear):
        return place, call.group, call.layer, call.rows, call.part, Linear
    return ()
