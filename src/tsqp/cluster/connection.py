"""Joins the Ray of a cluster, and says what to do where it is not there."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path

from tsqp.cluster.own_ray import access
from tsqp.cluster.pool import Pool, RayPool
from tsqp.cluster.state import ClusterDirectory, Record
from tsqp.errors import ClusterError

CONNECT_S = 5.0

Connect = Callable[[ClusterDirectory, Record], AbstractContextManager[Pool]]


@contextmanager
def connected(directory: ClusterDirectory, record: Record) -> Iterator[Pool]:
    """Join the Ray of a cluster for a while. Raises ClusterError where it is not there.

    Standard output is Ray's meanwhile, and is dropped: it prints there what its nodes have to say, in the middle of a
    command's own words, whatever its options for logs are.
    """
    try:
        _look_for(record.ray)
    except (OSError, ValueError) as error:
        raise _not_joined(record, error) from None
    os.environ.update(access(Path(record.token), own=record.own))  # read when Ray is imported
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            ray.init(
                address=record.ray,
                namespace=record.namespace,
                log_to_driver=False,
                logging_level="error",
                configure_logging=False,
            )
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise _not_joined(record, error) from None
        try:
            yield RayPool(directory, record)
        finally:
            ray.shutdown()


def listens(address: str) -> bool:
    """Whether somebody does. Where none is, a Ray is gone, whatever is left of its processes."""
    try:
        _look_for(address)
    except (ConnectionRefusedError, ValueError):
        return False
    except OSError:  # it is silent
        pass
    return True


def _not_joined(record: Record, error: Exception) -> ClusterError:
    if record.own:
        return ClusterError(
            f"the Ray of cluster {record.name} does not answer ({_first_line(error)}): tsqp cluster down --name "
            f"{record.name} clears it away"
        )
    return ClusterError(f"the Ray at {record.ray} cannot be joined: {_first_line(error)}")


def _look_for(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for minutes, and not end at Ctrl-C."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
