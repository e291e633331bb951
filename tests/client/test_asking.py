"""A question to a server: what comes back is evidence with the certificate of that connection, or one clear line."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.client.evidence_server import evidence_server, honest
from tests.commands import LIMIT_S
from tests.tee.certificates import key_pair
from tests.tee.policies import policy
from tsqp.client.address import ServerAddress, parse_server
from tsqp.client.asking import ask
from tsqp.errors import EvidenceRefused, InputError, TsqpError
from tsqp.tee.collateral import Without
from tsqp.tee.evidence import MAX_EVIDENCE_BYTES
from tsqp.tee.verification import verify_connection

PAIR = key_pair()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host", "https://host:443"),
        ("https://host:8443/v1/", "https://host:8443"),
        ("https://[::1]:1", "https://[::1]:1"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(parse_server(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["http://host", "host:443", "https://", "https://host/v2", "https://host?x=1", "https://a@host", "https://h:99999"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="https://host:port"):
        parse_server(text)


def test_evidence_is_of_the_connection_it_came_over(tmp_path: Path) -> None:
    with evidence_server(PAIR, honest(PAIR), tmp_path) as address:
        shown, again = ask(parse_server(address)), ask(parse_server(address))
    assert shown.certificate == PAIR.der
    assert shown.nonce != again.nonce
    now = shown.evidence.made_at
    given = {"nonce": shown.nonce, "certificate": shown.certificate, "now": now}
    verify_connection(shown.evidence, policy(["none"]), Without(), **given)  # type: ignore[arg-type]


def test_evidence_that_is_relayed_is_refused(tmp_path: Path) -> None:
    """A server in the middle, with its own certificate and the honest one's answers."""
    between = key_pair()
    with evidence_server(between, honest(PAIR), tmp_path) as address:
        shown = ask(parse_server(address))
    given = {"nonce": shown.nonce, "certificate": shown.certificate, "now": shown.evidence.made_at}
    with pytest.raises(EvidenceRefused, match="certificate-sha256"):
        verify_connection(shown.evidence, policy(["none"]), Without(), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((404, b"no such page"), "status 404 .no such page."),
        ((503, b"\x1b[2J"), r"status 503 .\\x1b"),
        ((302, b""), "status 302"),
        ((200, b""), "cannot be read"),
        ((200, b"{}"), "cannot be read"),
        ((200, b"x" * (MAX_EVIDENCE_BYTES + 1)), "65537 bytes"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer: tuple[int, bytes], told: str, tmp_path: Path) -> None:
    with (
        evidence_server(PAIR, lambda _nonce: answer, tmp_path) as address,
        pytest.raises(EvidenceRefused, match=told),
    ):
        ask(parse_server(address))


def test_nobody_there_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TsqpError, match=rf"no evidence from https://127\.0\.0\.1:{port}: "):
        ask(ServerAddress("127.0.0.1", port))


def test_a_server_that_never_answers_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TsqpError, match="timed out"):
        ask(ServerAddress("127.0.0.1", silent.getsockname()[1]), timeout_s=0.2)


def test_a_name_that_nobody_resolves_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def silent(*_: object, **__: object) -> list[object]:
        over.wait(LIMIT_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    began = time.monotonic()
    try:
        with pytest.raises(TsqpError, match=r"no evidence from https://model\.example:443: 'its name was not resolved"):
            ask(ServerAddress("model.example", 443), timeout_s=0.2)
        assert time.monotonic() - began < LIMIT_S / 2
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "tsqp-resolve")
    finally:
        over.set()


def test_a_name_that_there_is_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(TsqpError, match=r"no evidence from https://model\.example:443: .*not known"):
        ask(ServerAddress("model.example", 443))


def test_a_name_that_is_none_is_one_line() -> None:
    with pytest.raises(TsqpError, match=r"no evidence from .*label too long"):
        ask(ServerAddress("x" * 64, 443))


def test_each_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with evidence_server(PAIR, honest(PAIR), tmp_path) as address, socket.create_server(("127.0.0.1", 0)) as closed:
        port, nobody = parse_server(address).port, closed.getsockname()[1]
        closed.close()
        other = (9999, socket.SOCK_STREAM, 0, "", ("::1", port))  # of a family that this machine has not
        ours = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", one)) for one in (nobody, port)]
        found = [other, *ours]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert ask(ServerAddress("model.example", port)).certificate == PAIR.der


@pytest.mark.parametrize(
    ("retry_after", "waited_s"),
    [("3", 3.0), ("", 1.0), ("soon", 1.0), ("-1", 1.0), ("nan", 1.0), ("1e9", 1.0), ("9" * 400, 5.0)],
)
def test_a_server_that_many_ask_is_asked_once_more(retry_after: str, waited_s: float, tmp_path: Path) -> None:
    nonces: list[str] = []
    slept: list[float] = []

    def busy_once(nonce: str) -> tuple[int, bytes]:
        nonces.append(nonce)
        return (429, b"ask again") if len(nonces) == 1 else honest(PAIR)(nonce)

    with evidence_server(PAIR, busy_once, tmp_path, {"retry-after": retry_after}) as address:
        shown = ask(parse_server(address), sleep=slept.append)
    assert slept == [waited_s]
    assert [shown.nonce.hex()] == nonces[1:] != nonces[:1]


@pytest.mark.parametrize(("timeout_s", "times"), [(LIMIT_S, 2), (4.5, 1)])
def test_a_server_that_many_ask_is_not_asked_for_ever(timeout_s: float, times: int, tmp_path: Path) -> None:
    """Nor where there is no time to wait as long as it wants."""
    nonces: list[str] = []

    def busy(nonce: str) -> tuple[int, bytes]:
        nonces.append(nonce)
        return 429, b"ask again"

    with (
        evidence_server(PAIR, busy, tmp_path, {"retry-after": "5"}) as address,
        pytest.raises(EvidenceRefused, match="status 429"),
    ):
        ask(parse_server(address), timeout_s, sleep=lambda _s: None)
    assert len(nonces) == times


@contextmanager
def dripping(directory: Path, plain: bytes, answer: bytes | None) -> Iterator[ServerAddress]:
    """A server that sends ``plain`` without TLS, or ``answer`` with it, and then a byte whenever one is waited for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PAIR.write(directory))
    ended = threading.Event()

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            if answer is not None:
                connection = context.wrap_socket(connection, server_side=True)
                connection.recv(4096)
            connection.sendall(plain if answer is None else answer)
            for _ in range(300):
                if ended.wait(0.01):
                    break
                connection.sendall(b"x")
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        try:
            yield ServerAddress("127.0.0.1", listening.getsockname()[1])
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize(
    ("plain", "answer"),
    [
        (b"\x16\x03\x03\x40\x00", None),  # a record of 16 KiB
        (b"", b"HTTP/1.1 200 OK\r\nx-slow: "),
        (b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n"),
        (b"", b"HTTP/1.1 200 OK\r\n\r\n"),  # ends with the connection
    ],
    ids=["handshake", "head", "body", "body without a length"],
)
def test_a_server_that_drips_has_no_more_time(plain: bytes, answer: bytes | None, tmp_path: Path) -> None:
    with dripping(tmp_path, plain, answer) as server, pytest.raises(TsqpError, match=r"no evidence from .*timed out"):
        ask(server, timeout_s=0.3)


def test_a_server_without_tls_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def speak() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(4096)

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(TsqpError, match="no evidence from"):
            ask(ServerAddress("127.0.0.1", plain.getsockname()[1]))
        thread.join()
