"""Where a server is, as users type it: ``https://host[:port]``."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from tsqp.errors import InputError

HTTPS_PORT = 443


@dataclass(frozen=True)
class ServerAddress:
    """A host and a port that speak TLS. ``str`` gives the URL back, without a path."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"


def parse_server(text: str) -> ServerAddress:
    """``https://host``, with a port, and ``/v1`` or nothing behind it. Raises InputError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise InputError(f"{text!a:.200} is no address: give https://host:port") from None
    if parts.scheme != "https" or not parts.hostname:
        raise InputError(f"{text!a:.200} is no address with TLS, which evidence is bound to: give https://host:port")
    if parts.path.strip("/") not in ("", "v1") or parts.query or parts.fragment or parts.username is not None:
        raise InputError(f"{text!a:.200} has more than a host and a port: give https://host:port")
    return ServerAddress(parts.hostname, HTTPS_PORT if port is None else port)
