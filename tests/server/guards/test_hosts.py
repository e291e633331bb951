"""Names that the server answers to, against DNS rebinding; origins of pages, against pages that only send."""

from __future__ import annotations

import pytest

from tests.server.asgi import ask, echo, error_of
from tsqp.server.guards.faults import Faults
from tsqp.server.guards.hosts import Hosts, Origins, host_of, is_wildcard, names_for

LOOPBACK = Faults(Hosts(echo, names_for("127.0.0.1", ["api.example"])))
EVERYWHERE = Faults(Hosts(echo, names_for("0.0.0.0"), any_number=True))


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8000", "::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:DB8:0::0:1]:80", "2001:db8::1"),
        ("api.example.:443", "api.example"),
        ("localhost:evil", "localhost:evil"),
        ("", ""),
    ],
)
def test_the_host_of_an_authority(authority: str, host: str) -> None:
    assert host_of(authority) == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "api.example", "localhost:8000"])
def test_its_own_names_pass(host: str) -> None:
    assert ask(LOOPBACK, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.9", "", "localhost:x"]
)
def test_other_names_are_refused(host: str) -> None:
    answer = ask(LOOPBACK, headers={"host": host})
    assert answer.status_code == 421
    assert error_of(answer)["code"] == "host_not_allowed"
    assert "--allow-host" in answer.text
    assert "evil" not in answer.text


def test_a_server_on_an_address_answers_to_it_however_it_is_written() -> None:
    app = Faults(Hosts(echo, names_for("2001:db8::1")))
    for host in ("[2001:db8::1]:8000", "[2001:DB8:0:0::1]", "localhost"):
        assert ask(app, headers={"host": host}).status_code == 200
    assert ask(app, headers={"host": "[2001:db8::2]:8000"}).status_code == 421


def test_two_names_are_refused() -> None:
    assert ask(LOOPBACK, headers=[("host", "localhost"), ("host", "localhost")]).status_code == 421


def test_a_server_on_all_addresses_takes_numbers_and_no_other_names() -> None:
    assert is_wildcard("0.0.0.0")
    assert is_wildcard("::")
    assert not is_wildcard("127.0.0.1")
    for host in ("10.1.2.3:8000", "[2001:db8::1]:8000", "localhost"):
        assert ask(EVERYWHERE, headers={"host": host}).status_code == 200
    for host in ("evil.example", "10.1.2.3.evil.example", "10.1.2"):
        assert ask(EVERYWHERE, headers={"host": host}).status_code == 421


ORIGINS = Faults(Origins(echo, ["https://app.example"]))


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("https://app.example", 200),
        ("http://localhost", 200),  # a page of this server
        ("https://localhost", 403),  # another scheme is another origin
        ("http://localhost:8000", 403),  # and so is another port
        ("https://app.example.evil", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_a_page_of_another_origin_makes_nothing_happen(origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin}
    assert ask(ORIGINS, method="POST", headers=headers, content=b"{}").status_code == status
