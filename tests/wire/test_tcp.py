"""TCP: who may be reached without keys, and who with which."""

from __future__ import annotations

import socket
from contextlib import closing, suppress

import pytest
import zmq

from tests.wire.links import WAIT_S, arrived, new_key_pair
from tsqp.errors import AddressError, OptionError, WorkerUnreachable
from tsqp.wire.channel import Frames
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.keys import ClientKeys, WorkerKeys

WORKER, CLIENT, OTHER = new_key_pair(), new_key_pair(), new_key_pair()
WORKER_KEYS = WorkerKeys(WORKER, frozenset([CLIENT.public]))
CLIENT_KEYS = ClientKeys(CLIENT, WORKER.public)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:0"])
def test_plain_tcp_off_this_machine_is_not_listened_on(address: str) -> None:
    with pytest.raises(AddressError, match="plain TCP"):
        listen(address)


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:7000", "tcp://[2001:db8::1]:7000", "tcp://0.0.0.0:7000"])
def test_plain_tcp_off_this_machine_is_not_connected_to(address: str) -> None:
    with pytest.raises(AddressError, match="plain TCP"):
        connect(address)


def test_a_name_that_only_resolves_to_loopback_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 7000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    with pytest.raises(AddressError, match="plain TCP"):
        connect("tcp://worker.example:7000")


def test_a_localhost_that_is_elsewhere_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 7000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    with pytest.raises(AddressError, match="plain TCP"):
        connect("tcp://localhost:7000")


def test_plain_tcp_everywhere_when_it_is_asked_for() -> None:
    with closing(listen("tcp://0.0.0.0:0", insecure_plain_tcp=True)) as listener:
        address = listener.address.replace("0.0.0.0", "127.0.0.1")
        with closing(connect(address)) as channel:
            channel.send(Frames(b"call"))
            assert arrived(listener).frames.control == b"call"


def test_ipv6() -> None:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        with closing(listen("tcp://[::1]:0")) as listener, closing(connect(listener.address)) as channel:
            assert channel.address.startswith("tcp://[::1]:")
            channel.send(Frames(b"call"))
            assert arrived(listener).frames.control == b"call"
        return
    pytest.skip("no IPv6 here")


def test_localhost_keeps_its_name() -> None:
    with closing(listen("tcp://localhost:0")) as listener, closing(connect(listener.address)) as channel:
        assert channel.address.startswith("tcp://localhost:")


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(AddressError, match=r"worker\.invalid is not known"):
        connect("tcp://worker.invalid:7000")


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(AddressError, match="cannot listen"):
        listen("tcp://192.0.2.1:0", insecure_plain_tcp=True)


def test_port_0_cannot_be_connected_to() -> None:
    with pytest.raises(AddressError, match="port 0"):
        connect("tcp://127.0.0.1:0")


@pytest.mark.parametrize(
    ("worker_keys", "client_keys", "complaint"),
    [
        (WORKER_KEYS, ClientKeys(CLIENT, OTHER.public), "keys did not match"),
        (WORKER_KEYS, ClientKeys(OTHER, WORKER.public), "keys did not match"),
        (WORKER_KEYS, None, "asks for worker.key"),
        (None, CLIENT_KEYS, "keys did not match"),
    ],
    ids=["another worker", "client not on the list", "client without keys", "worker without keys"],
)
def test_wrong_keys_connect_nothing(
    worker_keys: WorkerKeys | None, client_keys: ClientKeys | None, complaint: str
) -> None:
    with closing(listen("tcp://127.0.0.1:0", security=worker_keys)) as listener:
        with pytest.raises(WorkerUnreachable, match=complaint) as caught:
            connect(listener.address, security=client_keys, connect_timeout_s=WAIT_S)
        assert listener.receive(0.0) is None
    for pair in (WORKER, CLIENT, OTHER):
        assert pair.secret.decode() not in str(caught.value)


def test_a_client_that_waits_for_no_handshake_gets_nothing_through() -> None:
    with (
        closing(listen("tcp://127.0.0.1:0", security=WORKER_KEYS)) as listener,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as client,
    ):
        client.linger = 0
        client.curve_publickey, client.curve_secretkey, client.curve_serverkey = (
            OTHER.public,
            OTHER.secret,
            WORKER.public,
        )
        client.connect(listener.address)
        client.send(b"let me in")
        assert listener.receive(0.3) is None


def test_keys_are_refused_where_they_would_do_nothing(private_dir: object) -> None:
    for address in ("mem:x", f"ipc://{private_dir}/x.sock"):
        with pytest.raises(OptionError, match="tcp"):
            listen(address, security=WORKER_KEYS)
        with pytest.raises(OptionError, match="tcp"):
            connect(address, insecure_plain_tcp=True)
    with pytest.raises(OptionError, match="exclude"):
        connect("tcp://127.0.0.1:7000", security=CLIENT_KEYS, insecure_plain_tcp=True)


def test_a_worker_that_lets_nobody_in_is_a_mistake() -> None:
    with pytest.raises(AddressError, match="at least one client"):
        WorkerKeys(WORKER, frozenset())


def test_secrets_do_not_show() -> None:
    assert WORKER.secret.decode() not in repr(WORKER_KEYS)
    assert CLIENT.secret.decode() not in repr(CLIENT_KEYS)
