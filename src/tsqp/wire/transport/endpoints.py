"""From an address to an open transport. The scheme decides; an option that it cannot honour is refused."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tsqp.errors import OptionError
from tsqp.wire.channel import MAX_FRAME_BYTES, Channel, Listener
from tsqp.wire.transport.address import Address, Transport, parse_address
from tsqp.wire.transport.base import CONNECT_TIMEOUT_S
from tsqp.wire.transport.cuda import IpcDriver, connect_cuda, listen_cuda
from tsqp.wire.transport.keys import ClientKeys, WorkerKeys
from tsqp.wire.transport.memory import connect_memory, listen_memory
from tsqp.wire.transport.shm import ArenaKind, connect_shm, listen_shm
from tsqp.wire.transport.zmq import connect_zmq, listen_zmq


def connect(
    address: str,
    *,
    security: ClientKeys | None = None,
    insecure_plain_tcp: bool = False,
    arena: ArenaKind | None = None,
    arena_bytes: int | None = None,
    spin_s: float | None = None,
    user: int | None = None,
    driver: IpcDriver | None = None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> Channel:
    """Connect to a worker; over shm and cuda it may still be loading, otherwise it has answered when this returns.

    ``max_frame_bytes`` bounds one tensor, either way. ``arena_bytes``, ``spin_s`` and ``user`` are for shm and cuda:
    how much memory both sides together can take, how long to ask again and again before sleeping, and the user id of
    the worker where it is not this process's. ``arena``, the kind of memory, is for shm; ``driver``, in the place of
    CUDA's, for cuda.
    Plain TCP, without ``security``, stays on this machine unless ``insecure_plain_tcp``.
    Raises AddressError, PathRefused, OptionError, WorkerUnreachable (after at most ``connect_timeout_s`` seconds),
    DeviceError.
    """
    parsed = parse_address(address)
    _check_tcp_options(parsed, security, insecure_plain_tcp)
    local_options = _options(parsed, ("shm", "cuda"), arena_bytes=arena_bytes, spin_s=spin_s, user=user)
    shm_options = _options(parsed, ("shm",), arena=arena)
    cuda_options = _options(parsed, ("cuda",), driver=driver)
    limits: dict[str, Any] = {"connect_timeout_s": connect_timeout_s, "max_frame_bytes": max_frame_bytes}
    if parsed.transport == "mem":
        return connect_memory(parsed, max_frame_bytes=max_frame_bytes)
    if parsed.transport == "shm":
        return connect_shm(parsed, **limits, **local_options, **shm_options)
    if parsed.transport == "cuda":
        return connect_cuda(parsed, **limits, **local_options, **cuda_options)
    return connect_zmq(
        parsed,
        security=security,
        insecure_plain_tcp=insecure_plain_tcp,
        connect_timeout_s=connect_timeout_s,
        max_frame_bytes=max_frame_bytes,
    )


def listen(
    address: str,
    *,
    security: WorkerKeys | None = None,
    insecure_plain_tcp: bool = False,
    spin_s: float | None = None,
    users: Collection[int] = (),
    device: int | None = None,
    driver: IpcDriver | None = None,
    watch_fd: int | None = None,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> Listener:
    """Listen for clients. ``tcp://HOST:0`` takes a port that the system chooses; see ``Listener.address``.

    Plain TCP, without ``security``, stays on this machine unless ``insecure_plain_tcp``.
    ``watch_fd``, when it becomes readable or its other end closes, counts as ``Listener.interrupt``: a worker that
    watches its standard input ends with its parent. ``spin_s`` is for shm and cuda, see ``connect``; so is ``users``,
    the ids of users whose clients may connect beside this process's own. ``device`` is the number of the CUDA device
    that a worker at a cuda address computes on, ``driver`` what it has in the place of CUDA's.
    Raises AddressInUse, AddressError, PathRefused, OptionError, DeviceError.
    """
    parsed = parse_address(address)
    _check_tcp_options(parsed, security, insecure_plain_tcp)
    local_options = _options(parsed, ("shm", "cuda"), spin_s=spin_s, users=users or None)
    cuda_options = _options(parsed, ("cuda",), device=device, driver=driver)
    if parsed.transport == "mem":
        if watch_fd is not None:
            raise OptionError(f"{parsed}: a descriptor cannot be watched over mem")
        return listen_memory(parsed, max_frame_bytes=max_frame_bytes)
    if parsed.transport == "shm":
        return listen_shm(parsed, watch_fd=watch_fd, max_frame_bytes=max_frame_bytes, **local_options)
    if parsed.transport == "cuda":
        options = {**local_options, **cuda_options}
        return listen_cuda(parsed, watch_fd=watch_fd, max_frame_bytes=max_frame_bytes, **options)
    return listen_zmq(
        parsed,
        security=security,
        insecure_plain_tcp=insecure_plain_tcp,
        watch_fd=watch_fd,
        max_frame_bytes=max_frame_bytes,
    )


def _check_tcp_options(address: Address, security: object, insecure_plain_tcp: bool) -> None:
    if address.transport != "tcp" and (security is not None or insecure_plain_tcp):
        raise OptionError(f"{address}: keys and plain TCP are options of tcp addresses only")
    if security is not None and insecure_plain_tcp:
        raise OptionError(f"{address}: keys and insecure plain TCP exclude each other; give one of them")


def _options(address: Address, transports: tuple[Transport, ...], **options: Any) -> dict[str, Any]:
    """The options that were given, if they can be honoured: by these transports alone."""
    given = {name: value for name, value in options.items() if value is not None}
    if given and address.transport not in transports:
        chosen = " and ".join(transports)
        raise OptionError(f"{address}: {', '.join(given)} can only be chosen for {chosen} addresses")
    return given
