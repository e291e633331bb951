"""A front is not trusted: whatever it sends, or does not send, is one error within a bounded time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zmq

from tests.fronts import front_thread, not_utf8
from tests.wire import zmtp
from tests.wire.links import WAIT_S
from tsqp.errors import MalformedAddress, RosterError
from tsqp.wire.channel import Frames
from tsqp.wire.roster import MOST_BYTES, Member, Roster, roster_document
from tsqp.wire.transport import connect
from tsqp.wire.transport.front import ASK, find_roster, parse_roster_address
from tsqp.wire.transport.keys import ClientKeys, KeyPair, WorkerKeys

MEMBER = Member("tcp://127.0.0.1:7000", "0..17")
DOCUMENT = roster_document(7, [MEMBER])
ROSTER = Roster(1, 7, (MEMBER,))


def new_pair() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


@contextmanager
def raw_front(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a process that does with a connection what ``serve`` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)

        def run() -> None:
            line, _ = server.accept()
            with line:
                line.settimeout(WAIT_S)
                try:
                    serve(line)
                    zmtp.read_to_end(line)
                except OSError:
                    pass  # the client had enough

        thread = threading.Thread(target=run)
        thread.start()
        yield f"roster+tcp://127.0.0.1:{server.getsockname()[1]}"
        thread.join(WAIT_S)


def shake_hands(line: socket.socket) -> None:
    line.sendall(zmtp.GREETING + zmtp.ready(b"ROUTER"))
    zmtp.read_until(line, ASK)


def drip(line: socket.socket, data: bytes) -> None:
    for byte in data:
        line.sendall(bytes([byte]))
        time.sleep(0.02)  # slow is what this peer is; nothing waits for it


def found(address: str, deadline_s: float = WAIT_S, security: ClientKeys | None = None) -> Roster:
    return find_roster(parse_roster_address(address), security, deadline_s)


def test_a_front_gives_the_roster_of_the_moment() -> None:
    epochs = iter((7, 8))
    with front_thread(lambda: roster_document(next(epochs), [MEMBER])) as address:
        assert [found(address).epoch, found(address).epoch] == [7, 8]


def test_a_roster_may_have_as_many_bytes_as_it_may_have() -> None:
    with front_thread(lambda: DOCUMENT.ljust(MOST_BYTES)) as address:
        assert found(address) == ROSTER


def test_a_front_with_keys_answers_whom_it_knows_and_proves_who_it_is() -> None:
    own, client, stranger = new_pair(), new_pair(), new_pair()
    with front_thread(lambda: DOCUMENT, WorkerKeys(own, frozenset({client.public}))) as address:
        assert found(address, security=ClientKeys(client, own.public)) == ROSTER
        for wrong in (ClientKeys(stranger, own.public), ClientKeys(client, stranger.public), None):
            with pytest.raises(RosterError, match="cannot be asked"):
                found(address, 1, wrong)


def test_a_front_answers_nothing_but_the_question_and_goes_on() -> None:
    asked: list[bytes] = []

    def document() -> bytes:
        asked.append(DOCUMENT)
        return DOCUMENT

    with front_thread(document) as address, closing(connect(address.removeprefix("roster+"))) as channel:
        for wrong in (Frames(b""), Frames(ASK + b"0"), Frames(ASK, (memoryview(b"x"),))):
            channel.send(wrong)
        channel.send(Frames(ASK))
        assert bytes(channel.receive(WAIT_S).tensors[0]) == DOCUMENT
        assert found(address) == ROSTER
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ((b"tsqp roster 2", DOCUMENT), "of another version"),
        ((ASK,), "something else"),
        ((ASK, DOCUMENT, b""), "something else"),
        ((b"", DOCUMENT), "something else"),
        ((ASK, b""), "none of version 1"),
        ((ASK, b"\xff" * 100), "none of version 1"),
        ((ASK, not_utf8(DOCUMENT)), "none of version 1"),
        ((ASK, b"x" * (MOST_BYTES + 32)), "the limit is"),
        ((ASK, *[b""] * 9), "cannot be asked"),
    ],
)
def test_an_answer_that_is_no_roster_is_refused(frames: tuple[bytes, ...], says: str) -> None:
    def answer(line: socket.socket) -> None:
        shake_hands(line)
        *first, last = frames
        line.sendall(b"".join(zmtp.frame(data, more=True) for data in first) + zmtp.frame(last))

    with raw_front(answer) as address, pytest.raises(RosterError, match=says) as caught:
        found(address)
    assert str(caught.value).startswith(address)
    assert str(caught.value).isprintable()


def test_a_document_over_the_limit_is_refused_by_its_length() -> None:
    def claim(line: socket.socket) -> None:
        shake_hands(line)
        line.sendall(zmtp.frame(ASK, more=True) + zmtp.frame(b"x", claimed=1 << 40))

    with raw_front(claim) as address, pytest.raises(RosterError, match="sent more than 1048576 bytes"):
        found(address)  # and not at the deadline


@pytest.mark.parametrize("shakes_hands", [False, True])
@pytest.mark.parametrize("slow", [b"", b"x" * 2000])
def test_silence_and_a_slow_drip_end_at_the_deadline(shakes_hands: bool, slow: bytes) -> None:
    def serve(line: socket.socket) -> None:
        if shakes_hands:
            shake_hands(line)
            drip(line, zmtp.frame(ASK, more=True) + zmtp.frame(b"", claimed=5000)[:9] + slow if slow else b"")
        else:
            drip(line, zmtp.GREETING[:10] + slow if slow else b"")

    with raw_front(serve) as address, pytest.raises(RosterError):
        found(address, 0.3)


def test_a_front_that_leaves_in_the_middle_is_noticed_at_once() -> None:
    def leave(line: socket.socket) -> None:
        shake_hands(line)
        line.shutdown(socket.SHUT_RDWR)

    with raw_front(leave) as address, pytest.raises(RosterError, match="ended the connection"):
        found(address)


def test_nobody_there_is_said_with_the_address() -> None:
    with socket.socket() as taken:  # at which nobody listens, as long as it is there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RosterError, match=rf"^roster\+tcp://127.0.0.1:{port}: the front cannot be asked"):
            found(f"roster+tcp://127.0.0.1:{port}", 1)


def test_a_file_is_read_whole_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    with pytest.raises(RosterError, match=r"roster.json: the roster cannot be read: No such file"):
        found(f"roster://{path}")
    path.write_bytes(DOCUMENT)
    assert found(f"roster://{path}") == ROSTER
    path.write_bytes(DOCUMENT.ljust(MOST_BYTES + 1))
    with pytest.raises(RosterError, match="limit"):
        found(f"roster://{path}")
    with pytest.raises(RosterError, match="cannot be read: Is a directory"):
        found(f"roster://{tmp_path}")


@pytest.mark.parametrize("text", ["roster:///run/x.json", "roster+tcp://h.example:7000", "roster+tcp://[::1]:7000"])
def test_an_address_of_a_roster(text: str) -> None:
    assert str(parse_roster_address(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "tcp://h:1",
        "roster",
        "roster://x",
        "roster:x",
        "roster:///",
        "roster:///x\n",
        "roster+ipc:///x",
        "roster+tcp://h",
        "roster+tcp://h:0",
    ],
)
def test_a_malformed_address_of_a_roster(text: str) -> None:
    with pytest.raises(MalformedAddress):
        parse_roster_address(text)
