"""Addresses as users type them: ``mem:NAME``, ``ipc:///x.sock``, ``shm:///x.sock``, ``cuda:///x.sock``, ``tcp://h:port``."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tsqp.errors import AddressError, MalformedAddress

Transport = Literal["mem", "ipc", "shm", "cuda", "tcp"]

MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108, the closing zero byte included

_MEMORY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TCP = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})")
_SHOWN = 200  # characters of a malformed address that an error repeats


@dataclass(frozen=True)
class Address:
    """One place to listen on or connect to. Built by ``parse_address``; ``str`` gives the normal form back."""

    transport: Transport
    target: str

    def __str__(self) -> str:
        return f"mem:{self.target}" if self.transport == "mem" else f"{self.transport}://{self.target}"

    @property
    def path(self) -> Path:
        """The socket of an ipc, shm or cuda address."""
        return Path(self._target_of("ipc", "shm", "cuda"))

    @property
    def host(self) -> str:
        """The host of a tcp address, an IPv6 one without its brackets."""
        return self._target_of("tcp").rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of a tcp address; 0 lets the system choose one to listen on."""
        return int(self._target_of("tcp").rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether a tcp address cannot leave this machine: 127.0.0.0/8, ::1, localhost. A name is not looked up."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def with_port(self, port: int) -> Address:
        """The same tcp host with the port that the system chose."""
        return Address("tcp", f"{self._target_of('tcp').rpartition(':')[0]}:{port}")

    def _target_of(self, *transports: Transport) -> str:
        if self.transport not in transports:
            raise AddressError(f"{self} is not an address of {' or '.join(transports)}")
        return self.target


def in_brackets(host: str) -> str:
    """A host as an address has it: an IPv6 one in brackets, whether it came with them or not."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def parse_address(text: str) -> Address:
    """Parse and normalise an address; a bare absolute path means ipc. Raises AddressError."""
    if text.startswith("/"):
        return Address("ipc", _socket_path(text, text))
    scheme, separator, rest = text.partition(":")
    if separator and scheme == "mem":
        return Address("mem", _name(rest, text))
    if rest.startswith("//") and scheme == "ipc":
        return Address("ipc", _socket_path(rest[2:], text))
    if rest.startswith("//") and scheme == "shm":
        return Address("shm", _socket_path(rest[2:], text))
    if rest.startswith("//") and scheme == "cuda":
        return Address("cuda", _socket_path(rest[2:], text))
    if rest.startswith("//") and scheme == "tcp":
        return Address("tcp", _host_and_port(rest[2:], text))
    raise _malformed(text, "use shm:///path, ipc:///path, tcp://host:port, cuda:///path or mem:NAME")


def _name(name: str, text: str) -> str:
    if not _MEMORY_NAME.fullmatch(name):
        raise _malformed(text, "a mem: name has 1 to 64 letters, digits, dots, dashes or underscores")
    return name


def _socket_path(path: str, text: str) -> str:
    # "@name" is Linux's abstract namespace: no file, so no permissions. It fails here because it is not absolute.
    if not path.startswith("/"):
        raise _malformed(text, "the path of a socket must be absolute")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.isprintable() or ".." in parts or not parts or path.endswith(("/", "/.")):
        raise _malformed(text, "the path of a socket must name a file, without '..' or control characters")
    normal = "/" + "/".join(parts)
    if len(os.fsencode(normal)) > MAX_SOCKET_PATH_BYTES:
        raise _malformed(text, f"the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes; choose a shorter one")
    return normal


def _host_and_port(target: str, text: str) -> str:
    match = _TCP.fullmatch(target)
    if match is None:
        raise _malformed(text, "use tcp://host:port, an IPv6 host in brackets")
    host, port = match["host"].lower(), int(match["port"])
    if port > 65_535:
        raise _malformed(text, "a port lies between 0 and 65535")
    return f"{_normal_host(host, text)}:{port}"


def _normal_host(host: str, text: str) -> str:
    """IP addresses in their canonical form; names as they are."""
    try:
        if host.startswith("["):
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
        # The system's resolver also reads 127.1 and 0x7f000001 as addresses; here only four decimal numbers are one.
        if host[-1].isdigit() or host.endswith("."):
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise _malformed(text, "that is not an IP address") from None
    return host


def _malformed(text: str, advice: str) -> MalformedAddress:
    return MalformedAddress(f"malformed address {text[:_SHOWN]!a}: {advice}")
