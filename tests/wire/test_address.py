"""Addresses: what is one, in which normal form, and that everything else is an AddressError."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tsqp.errors import AddressError
from tsqp.wire.transport.address import Address, in_brackets, parse_address


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("mem:test", "mem:test"),
        ("ipc:///run/x.sock", "ipc:///run/x.sock"),
        ("/run/x.sock", "ipc:///run/x.sock"),
        ("ipc:////run//./x.sock", "ipc:///run/x.sock"),
        ("ipc:///run/a b", "ipc:///run/a b"),
        ("shm:////run//x.sock", "shm:///run/x.sock"),
        ("cuda:////run//x.sock", "cuda:///run/x.sock"),
        ("ipc:///" + "x" * 106, "ipc:///" + "x" * 106),
        ("tcp://127.0.0.1:7000", "tcp://127.0.0.1:7000"),
        ("tcp://Worker.Example:07000", "tcp://worker.example:7000"),
        ("tcp://[0:0:0:0:0:0:0:1]:0", "tcp://[::1]:0"),
        ("tcp://[2001:DB8::1]:65535", "tcp://[2001:db8::1]:65535"),
    ],
)
def test_addresses_have_one_normal_form(text: str, normal: str) -> None:
    assert str(parse_address(text)) == normal


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "mem:", "mem:a/b", "mem:" + "x" * 65, "inproc://x", "http://x:1", "TCP://x:1"),
        *("ipc://", "ipc://x.sock", "ipc://@abstract", "ipc://*", "ipc:/x", "ipc:///", "/", "//", "/run/", "/run/."),
        *("shm:x", "shm:///", "shm://x.sock", "shm:///run/../x"),
        *("cuda:0", "cuda:///", "cuda://x.sock", "cuda:///run/../x"),
        *("/run/../x", "/run/\0x", "/run/\nx", "/" + "x" * 107, "/" + "é" * 54, "/\ud800"),
        *("tcp://", "tcp://host", "tcp://:1", "tcp://host:", "tcp://host:x", "tcp://host:-1", "tcp://host:65536"),
        *("tcp://host:123456", "tcp://*:1", "tcp://::1:1", "tcp://[::1]", "tcp://[1.2.3.4]:1", "tcp://[::1%lo]:1"),
        *("tcp://127.1:1", "tcp://256.0.0.1:1", "tcp://0x7f000001:1", "tcp://a b:1", "tcp://host:１", "tcp:///x:1"),
        *("tcp://user@host:1", "tcp://host:1/x", "tcp://host:1\n", "tcp://127.0.0.1;127.0.0.1:1"),
    ],
)
def test_everything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(AddressError, match="malformed address") as caught:
        parse_address(text)
    assert str(caught.value).isprintable()


@given(st.text() | st.from_regex(r"\A(mem:|ipc://|tcp://|/)[ -~é\n]{0,120}\Z"))
@example("tcp://[::]:0")
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert parse_address(str(address)) == address


@given(st.ip_addresses(), st.integers(0, 65_535))
def test_any_ip_address_and_port(ip: object, port: int) -> None:
    host = f"[{ip}]" if ":" in str(ip) else str(ip)
    address = parse_address(f"tcp://{host}:{port}")
    assert (address.host, address.port) == (str(ip), port)
    assert address.with_port(1) == parse_address(f"tcp://{host}:1")
    assert (in_brackets(str(ip)), in_brackets(host)) == (host, host)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("[::ffff:8.8.8.8]", False),
        ("128.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
    ],
)
def test_what_stays_on_this_machine(host: str, loopback: bool) -> None:
    assert parse_address(f"tcp://{host}:1").is_loopback is loopback


def test_each_kind_has_its_own_parts() -> None:
    with pytest.raises(AddressError):
        _ = Address("mem", "x").path
    with pytest.raises(AddressError):
        _ = Address("ipc", "/x").port
    assert str(parse_address("/run/x").path) == "/run/x"
