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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tsqp.client.address import ServerAddress
from tsqp.errors import EvidenceRefused, TsqpError
from tsqp.tee.evidence import MAX_EVIDENCE_BYTES, Evidence, read_evidence
from tsqp.tee.statement import NONCE_BYTES

PATH = "/v1/attestation"
TIMEOUT_S = 30.0  # a quote takes a TEE milliseconds, or seconds when many ask
WAIT_S, MAX_WAIT_S = 1.0, 5.0  # before the second question to a server that too many ask
SHOWN_BYTES = 200  # of an answer that is none


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

    ``timeout_s``: from the beginning to the end, however the other end drips. Each address of a name, and then the
    handshake, has as long before it fails by itself. Raises EvidenceRefused for what is no evidence, TsqpError where
    nobody answers.
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
    left_s = max(until - time.monotonic(), 1e-3)
    connection = http.client.HTTPSConnection(server.host, server.port, timeout=left_s, context=unverified_tls())
    try:
        connection.connect()
        with _within(until - time.monotonic(), connection.sock):
            certificate = connection.sock.getpeercert(binary_form=True)
            connection.request("GET", f"{PATH}?nonce={nonce.hex()}", headers={"accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read(MAX_EVIDENCE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:  # ssl.SSLError and TimeoutError are OSErrors
        why = str(error) or type(error).__name__
        raise TsqpError(f"no evidence from {server}: {why[:SHOWN_BYTES]!a}") from None
    finally:
        connection.close()
    if certificate is None:
        raise EvidenceRefused("certificate", "missing", "one of TLS")
    return _Answer(nonce, certificate, answer.status, body, _wait_s(answer.getheader("retry-after", "")))


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
