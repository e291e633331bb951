"""Memory of a device, as those who pass it on know it: an address and a size.

It is no buffer, so no code of the host can read it by mistake: whoever wants its bytes asks the device for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """``nbytes`` of a device from ``address`` on, in the address space that this process and its device share."""

    address: int
    nbytes: int


Payload = memoryview | DeviceMemory


def on_the_host(payload: Payload, place: str) -> memoryview:
    """A payload that a worker which computes on ``place`` can read. Raises ProtocolError for memory of a device."""
    if isinstance(payload, DeviceMemory):
        raise ProtocolError(f"memory of a device, and this worker computes on {place}")
    return payload
