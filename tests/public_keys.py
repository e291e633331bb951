"""Public CURVE keys in Z85, the same in every process: they are in the names of tests."""

from __future__ import annotations

import zmq
from zmq.utils import z85

KEYS = tuple(zmq.curve_public(z85.encode(bytes([number]) * 32)).decode() for number in range(1, 4))
