"""TCP hosts: names to numbers, and the rule that plain TCP stays on this machine."""

from __future__ import annotations

import ipaddress
import socket

from tsqp.errors import AddressError
from tsqp.wire.transport.address import Address


def resolve(address: Address, *, encrypted: bool, insecure_plain_tcp: bool) -> Address:
    """The address with its host as a number, once it is known to be allowed.

    Of several numbers an IPv4 one is taken, and no other is tried. Raises AddressError, also for plain TCP that
    would leave this machine without ``insecure_plain_tcp``.
    """
    ip = _look_up(address)
    # Both, because a name server may say 127.0.0.1 today, and a hosts file may send "localhost" anywhere.
    stays_here = address.is_loopback and ip.is_loopback
    if not (encrypted or stays_here or insecure_plain_tcp):
        raise AddressError(
            f"{address} leaves this machine, and plain TCP lets anyone on the way read and change everything; "
            "give keys (tsqp keys), or accept that with insecure_plain_tcp",
            fields=("insecure_plain_tcp",),
        )
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    return Address("tcp", f"{host}:{address.port}")


def _look_up(address: Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise AddressError(f"{address}: the host {address.host} is not known; check the name") from None
    numbers = [str(sockaddr[0]) for _, _, _, _, sockaddr in found]
    return ipaddress.ip_address(min(numbers, key=lambda number: ":" in number))
