"""One question to a server: what it shows of itself, over a TLS connection whose certificate is kept.

Nobody vouches for the certificate but the evidence: so the connection is not to be believed before that is verified,
and nothing is sent over it but a nonce.
"""

from __future__ import annotations

import http.client
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tsqp.client.address import ServerAddress
from tsqp.errors import EvidenceRefused, TsqpError
from tsqp.tee.evidence import MAX_EVIDENCE_BYTES, Evidence, read_evidence
from tsqp.tee.statement import NONCE_BYTES

PATH = "/v1/attestation"
TIMEOUT_S = 30.0  # a quote takes a TEE milliseconds, or seconds when many ask
WAIT_S, MAX_WAIT_S = 1.0, 5.0  # before the second question to a server that too many ask
SHOWN_BYTES = 200  # of an answer that is none

_Addresses = Sequence[tuple[int, int, int, str, Any]]  # as socket.getaddrinfo gives them


@dataclass(frozen=True)
class Shown:
    """What a server has shown. ``certificate``: the leaf of the connection, DER."""

    evidence: Evidence
    nonce: bytes
    certificate: bytes


def unverified_tls() -> ssl.SSLContext:
    """TLS 1.3 to whoever answers. The caller compares the certificate before anything is sent that is worth keeping."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def ask(server: ServerAddress, timeout_s: float = TIMEOUT_S, sleep: Callable[[float], None] = time.sleep) -> Shown:
    """Ask with a fresh nonce, and once more where too many ask.

    ``timeout_s``: from the beginning to the end, however slow the name's resolver is and however the other end drips.
    Raises EvidenceRefused for what is no evidence, TsqpError where nobody answers.
    """
    until = time.monotonic() + timeout_s
    answer = _answered(server, until)
    if answer.status == http.client.TOO_MANY_REQUESTS and time.monotonic() + answer.wait_s < until:
        sleep(answer.wait_s)
        answer = _answered(server, until)
    if answer.status != http.client.OK:
        found = f"an answer with status {answer.status} ({answer.body[:SHOWN_BYTES].decode('utf-8', 'replace')})"
        raise EvidenceRefused("evidence", found, f"what {server}{PATH} should give")
    return Shown(read_evidence(answer.body), answer.nonce, answer.certificate)


@dataclass(frozen=True)
class _Answer:
    """``wait_s``: before the next question, as the server wants it, within bounds."""

    nonce: bytes
    certificate: bytes
    status: int
    body: bytes
    wait_s: float


def _answered(server: ServerAddress, until: float) -> _Answer:
    """``until``: on the monotonic clock. Raises EvidenceRefused, TsqpError."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    context = unverified_tls()
    connection = http.client.HTTPSConnection(server.host, server.port, context=context)
    try:
        connection.sock = tls = context.wrap_socket(_connected(server, until), server_hostname=server.host)
        with _within(_left_s(until), tls):
            certificate = tls.getpeercert(binary_form=True)
            connection.request("GET", f"{PATH}?nonce={nonce.hex()}", headers={"accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read(MAX_EVIDENCE_BYTES + 1)
    except (OSError, UnicodeError, http.client.HTTPException) as error:  # ssl.SSLError and TimeoutError are OSErrors
        why = str(error) or type(error).__name__
        raise TsqpError(f"no evidence from {server}: {why[:SHOWN_BYTES]!a}") from None
    finally:
        connection.close()
    if certificate is None:
        raise EvidenceRefused("certificate", "missing", "one of TLS")
    return _Answer(nonce, certificate, answer.status, body, _wait_s(answer.getheader("retry-after", "")))


def _connected(server: ServerAddress, until: float) -> socket.socket:
    """To the first address of a server that takes a connection, each in its share of the time. Raises OSError."""
    failed = OSError("its name has no address")
    addresses = _addresses(server, until)
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        with ExitStack() as unless_connected:
            try:
                one = unless_connected.enter_context(socket.socket(family, kind, protocol))
                one.settimeout(_left_s(until) / (len(addresses) - number))
                one.connect(address)
            except OSError as error:
                failed = error
            else:
                unless_connected.pop_all()
                one.settimeout(_left_s(until))
                return one
    raise failed


def _addresses(server: ServerAddress, until: float) -> _Addresses:
    """Of the server's name. The system's resolver cannot be told to end: one that is too slow goes on beside us."""
    found: Future[_Addresses] = Future()

    def resolve() -> None:
        try:
            found.set_result(socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM))
        except Exception as error:  # whatever it is, it is raised below
            found.set_exception(error)

    threading.Thread(target=resolve, name="tsqp-resolve", daemon=True).start()
    try:
        return found.result(_left_s(until))
    except TimeoutError:
        raise TimeoutError("its name was not resolved in time") from None


def _left_s(until: float) -> float:
    """More than 0, which would mean no limit to a socket."""
    return max(until - time.monotonic(), 1e-3)


def _wait_s(text: str) -> float:
    """Of the header: whole seconds; a date is not read."""
    return min(float(text), MAX_WAIT_S) if text.isascii() and text.isdecimal() else WAIT_S


@contextmanager
def _within(left_s: float, tls: ssl.SSLSocket) -> Iterator[None]:
    """What happens on ``tls`` ends in time, or with TimeoutError: its own limit is for each read, of a byte or more."""
    over = threading.Event()

    def end() -> None:
        over.set()
        with suppress(OSError):
            socket.socket.shutdown(tls, socket.SHUT_RDWR)  # not that of ``tls``, after which it reads without TLS

    timer = threading.Timer(left_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # before the socket is closed and its number another's
        if over.is_set():
            raise TimeoutError("timed out")
