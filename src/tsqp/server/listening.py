"""Where a server listens, and the sockets for it, which are taken before a model is loaded.

Covers: a server that other machines can reach has keys and TLS, unless its operator says that it needs neither; a
socket in the file system is this user's alone (tests/server/test_listening.py). Does not cover: whoever terminates TLS
in front of the server reads everything. Assumes: the operator's certificate is one that clients trust.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsqp.errors import InputError, OptionError, TsqpError
from tsqp.private_path import check_holder, follow, open_private, reach

_INSTEAD = "choose a directory that you alone can write to"


@dataclass(frozen=True)
class Listening:
    """``unix_socket`` takes the place of host and port. ``metrics_port``: None for no metrics.

    ``insecure_exposed``: other machines may reach the server although it has no keys, or no TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    insecure_exposed: bool = False

    def check(self, *, has_keys: bool, own_tls: bool = False) -> None:
        """Raises OptionError for what would be unsafe, or cannot be. ``own_tls``: with a key made for this run."""
        if own_tls and (self.tls_cert is not None or self.tls_key is not None or self.unix_socket is not None):
            given = "unix_socket" if self.unix_socket is not None else "tls_cert"
            why = "it is bound to TLS" if given == "unix_socket" else "its key is made in memory, and is in no file"
            raise OptionError(
                f"server.evidence goes without server.{given}: {why}", fields=("server.evidence", f"server.{given}")
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            fields = ("server.tls_cert", "server.tls_key")
            raise OptionError("server.tls_cert and server.tls_key belong together: give both or none", fields=fields)
        if self.unix_socket is not None and self.tls_cert is not None:
            raise OptionError(
                "a socket in the file system has no TLS: leave out server.tls_cert and server.tls_key",
                fields=("server.tls_cert", "server.tls_key"),
            )
        self._check_in_use()
        if self.unix_socket is not None or is_loopback(self.host) or self.insecure_exposed:
            return
        missing = {"server.api_keys": has_keys, "server.tls_cert": self.tls_cert is not None or own_tls}
        names = [name for name, there in missing.items() if not there]
        if names:
            raise OptionError(
                f"other machines can reach {self.host}: give {' and '.join(names)}, listen on 127.0.0.1, or add "
                "server.insecure_exposed: then anyone on the way can read prompts, or use the server",
                fields=(*names, "server.insecure_exposed"),
            )

    def _check_in_use(self) -> None:
        """Raises OptionError for an address on which nobody would listen. One that is there unless told otherwise is
        not told apart from one that was given.
        """
        for name in ("host", "port"):
            if self.unix_socket is not None and getattr(self, name) != getattr(Listening, name):
                raise OptionError(
                    f"server.unix_socket takes the place of host and port: leave out server.{name}",
                    fields=(f"server.{name}", "server.unix_socket"),
                )
        if self.metrics_port is None and self.metrics_host != Listening.metrics_host:
            raise OptionError(
                "there are no metrics without server.metrics_port: give it, or leave out server.metrics_host",
                fields=("server.metrics_host", "server.metrics_port"),
            )

    def tls(self) -> ssl.SSLContext | None:
        """The certificate and its key, read; None without TLS. Raises PathRefused, InputError."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_certificate(context)
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Read certificate and key, which connections from now on have. Raises PathRefused, InputError."""
        if self.tls_cert is None or self.tls_key is None:
            return
        instead = "keep the key of the certificate where you alone can read it"
        try:
            os.close(open_private(follow(self.tls_key, instead), os.O_RDONLY, instead))
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key)  # a pair that is none
            context.load_cert_chain(self.tls_cert, self.tls_key)  # would leave one in use without its key
        except OSError as error:  # ssl.SSLError too
            fields = ("server.tls_cert", "server.tls_key")
            is_missing = f"{error.filename or self.tls_cert}: {error.strerror}"  # the key was opened before
            why = "they do not belong together, or are no PEM" if isinstance(error, ssl.SSLError) else is_missing
            raise InputError(f"server.tls_cert and server.tls_key cannot be used: {why}", fields=fields) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int, *, of: str = "") -> list[socket.socket]:
    """A socket for each address of ``host``. Port 0: one that is free, the same for all. Raises TsqpError.

    ``of``: what the fields that an error names begin with, as in ``server.metrics_port``.
    """
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(found):
            bound.append(one := socket.socket(family, socket.SOCK_STREAM))
            # Connections of a process that was killed may be in TIME_WAIT for a minute; its successor need not wait.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port_of(bound) or port, *address[2:]))
            # Two sockets may be bound to one port while none listens: so the port is taken here and not later. Nobody
            # is answered until the server is ready.
            one.listen(1)
    except OSError as error:
        for one in bound:
            one.close()
        raise _explained(error, host, port, f"server.{of}host", f"server.{of}port") from None
    return bound


def port_of(sockets: Sequence[socket.socket]) -> int:
    """The port that sockets are bound to; 0 for none yet."""
    return int(sockets[0].getsockname()[1]) if sockets else 0


def bind_unix(path: Path) -> socket.socket:
    """A socket in the file system that this user alone can reach. Raises PathRefused, TsqpError."""
    check_holder(path, _INSTEAD)
    place = reach(path, _INSTEAD)
    if os.path.lexists(place):
        if not stat.S_ISSOCK(place.lstat().st_mode):
            raise InputError(f"{place} is there and is no socket", fields=("server.unix_socket",))
        if _answers(place):
            raise TsqpError(f"{place} is in use: stop what listens there", fields=("server.unix_socket",))
        place.unlink()  # of a server that was killed
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # mode 0600 from the first moment on
    try:
        one.bind(str(place))
        one.listen(1)  # whoever else wants this place sees that it is taken; clients that come early wait
    except OSError as error:
        one.close()
        raise InputError(f"{place}: {error.strerror or error}", fields=("server.unix_socket",)) from None
    finally:
        os.umask(before)
    return one


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _explained(error: OSError, host: str, port: int, host_field: str, port_field: str) -> TsqpError:
    """One line, with what to do."""
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return InputError(f"{host_field} {host} is no address of this machine", fields=(host_field,))
    if error.errno == errno.EADDRINUSE:
        return TsqpError(
            f"port {port} of {host} is in use: stop what listens there, or give another as {port_field}",
            fields=(port_field,),
        )
    if error.errno == errno.EACCES:
        return InputError(
            f"port {port} needs rights that this user has not: give one of 1024 or more as {port_field}",
            fields=(port_field,),
        )
    return TsqpError(f"port {port} of {host} cannot be listened on: {error.strerror}")
