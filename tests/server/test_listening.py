"""Sockets: a port in use is one line, a server that others can reach has keys and TLS, a file is this user's alone."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from tsqp.errors import InputError, OptionError, PathRefused, TsqpError
from tsqp.server.listening import Listening, bind, bind_unix, is_loopback, port_of


def test_a_port_in_use_is_one_line_that_says_what_to_do() -> None:
    (held,) = bind("127.0.0.1", 0)
    with held, pytest.raises(TsqpError, match=r"port \d+ of 127\.0\.0\.1 is in use.*server\.port") as raised:
        bind("127.0.0.1", port_of([held]))
    assert raised.value.fields == ("server.port",)


def test_an_error_names_the_option_of_the_port_that_it_is_about() -> None:
    (held,) = bind("127.0.0.1", 0)
    with held, pytest.raises(TsqpError, match=r"give another as server\.metrics_port") as raised:
        bind("127.0.0.1", port_of([held]), of="metrics_")
    assert raised.value.fields == ("server.metrics_port",)
    with pytest.raises(InputError, match=r"server\.metrics_host 203\.0\.113\.1 is no address"):
        bind("203.0.113.1", 0, of="metrics_")


def test_a_port_in_time_wait_is_free() -> None:
    """As after a server that was killed while it had clients."""
    (listener,) = bind("127.0.0.1", 0)
    port = port_of([listener])
    with socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = listener.accept()
        listener.close()
        accepted.close()  # the first to close has the connection in TIME_WAIT
        assert client.recv(1) == b""
    (again,) = bind("127.0.0.1", port)
    again.close()


def test_all_addresses_of_a_name_have_one_port() -> None:
    sockets = bind("localhost", 0)
    assert len({port_of([one]) for one in sockets}) == 1
    for one in sockets:
        one.close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.1"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(InputError, match=f"server.host {host} is no address of this machine"):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    exposed = Listening(host=host)
    if loopback:
        exposed.check(has_keys=False)
    else:
        with pytest.raises(OptionError, match="other machines can reach"):
            exposed.check(has_keys=False)


def test_a_server_that_others_can_reach_has_keys_and_tls() -> None:
    tls: dict[str, Any] = {"tls_cert": Path("c"), "tls_key": Path("k")}
    none: dict[str, Any] = {}
    Listening(host="0.0.0.0", **tls).check(has_keys=True)
    Listening(host="0.0.0.0", insecure_exposed=True).check(has_keys=False)
    for options, has_keys, missing in [(none, True, "tls_cert"), (tls, False, "api_keys")]:
        with pytest.raises(OptionError, match=f"give server.{missing}, listen on") as raised:
            Listening(host="0.0.0.0", **options).check(has_keys=has_keys)
        assert raised.value.fields == (f"server.{missing}", "server.insecure_exposed")


def test_options_that_belong_together() -> None:
    for wrong in (Listening(tls_cert=Path("c")), Listening(tls_key=Path("k"))):
        with pytest.raises(OptionError, match="belong together"):
            wrong.check(has_keys=False)
    with pytest.raises(OptionError, match="has no TLS"):
        Listening(unix_socket=Path("s"), tls_cert=Path("c"), tls_key=Path("k")).check(has_keys=False)


@pytest.mark.parametrize(
    ("listening", "fields"),
    [
        (Listening(metrics_host="0.0.0.0"), ("server.metrics_host", "server.metrics_port")),
        (Listening(unix_socket=Path("s"), host="0.0.0.0"), ("server.host", "server.unix_socket")),
        (Listening(unix_socket=Path("s"), port=0), ("server.port", "server.unix_socket")),
    ],
)
def test_an_address_that_nobody_would_listen_on_is_refused(listening: Listening, fields: tuple[str, str]) -> None:
    with pytest.raises(OptionError, match=f"leave out {fields[0]}") as raised:
        listening.check(has_keys=True)
    assert raised.value.fields == fields


def test_what_a_server_has_anyway_may_be_said() -> None:
    Listening(unix_socket=Path("s"), host="127.0.0.1", port=8000, metrics_host="127.0.0.1").check(has_keys=False)
    Listening(metrics_host="0.0.0.0", metrics_port=0).check(has_keys=False)


def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_text("no certificate")
    key.write_text("no key")
    key.chmod(0o644)
    at = Listening(tls_cert=cert, tls_key=key)
    with pytest.raises(PathRefused, match="chmod 600"):
        at.tls()
    key.chmod(0o600)
    with pytest.raises(InputError, match="are no PEM"):
        at.tls()
    cert.unlink()
    with pytest.raises(InputError, match=f"{cert}: No such file"):
        at.tls()
    with pytest.raises(InputError, match=f"{key}x: No such file"):
        Listening(tls_cert=cert, tls_key=Path(f"{key}x")).tls()


def test_a_socket_in_the_file_system_is_this_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "tsqp.sock"
    with bind_unix(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(TsqpError, match="is in use"):
            bind_unix(path)
    with bind_unix(path):  # what a killed server left
        pass
    path.unlink()
    path.write_text("a file")
    with pytest.raises(InputError, match="is no socket"):
        bind_unix(path)
    assert path.read_text() == "a file"
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(PathRefused, match="open to others"):
        bind_unix(open_to_all / "s")
