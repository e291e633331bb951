"""Examples for balancers: what they go by is what the server gives, and TLS ends where the page says."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.unit_files import DEPLOY
from tests.tee.certificates import key_pair
from tsqp.server.guards.affinity import HEADER
from tsqp.server.health import OPEN_PATHS
from tsqp.server.run import KEPT_S
from tsqp.server.settings import ServerSettings

BALANCER = DEPLOY / "balancer"
NAME = "llm.example"  # that the servers' certificates are for
HAPROXY = sorted(BALANCER.glob("*.cfg"))


def text_of(name: str) -> str:
    """Without comments."""
    return re.sub(r"(?m)^\s*#.*$", "", (BALANCER / name).read_text("utf-8"))


def envoy() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((BALANCER / "affinity.envoy.yaml").read_text("utf-8"))["static_resources"]
    return found


def test_those_that_end_tls_go_by_the_header() -> None:
    assert f"balance hdr({HEADER})\n    hash-type consistent" in text_of("affinity.cfg")
    variable = f"$http_{HEADER.replace('-', '_')}"
    assert re.search(rf"map {re.escape(variable)} (\$\w+) ", text_of("affinity.nginx.conf"))
    (listener,), (cluster,) = envoy()["listeners"], envoy()["clusters"]
    (chain,) = listener["filter_chains"]
    (host,) = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    assert host["routes"][0]["route"]["hash_policy"] == [{"header": {"header_name": HEADER}}]
    assert cluster["lb_policy"] == "RING_HASH"


def test_a_server_that_is_asked_by_them_is_one_whose_certificate_they_know() -> None:
    """Inside the trusted domain too: whoever sits in between would read prompts. An authority has other holders of
    certificates, so the name counts as well.
    """
    (server,) = re.findall(r"(?m)^\s*default-server (.*)$", text_of("affinity.cfg"))
    options = server.split()
    for option, value in (("verify", "required"), ("verifyhost", NAME), ("ca-file", "/etc/tsqp/ca.pem")):
        assert options[options.index(option) + 1] == value
    assert "ssl" in options
    nginx = text_of("affinity.nginx.conf")
    assert "proxy_ssl_verify on;" in nginx
    assert f"proxy_ssl_name {NAME};" in nginx
    (cluster,) = envoy()["clusters"]
    common = cluster["transport_socket"]["typed_config"]["common_tls_context"]
    assert common["validation_context"].keys() == {"trusted_ca", "match_typed_subject_alt_names"}
    names = common["validation_context"]["match_typed_subject_alt_names"]
    assert names == [{"san_type": "DNS", "matcher": {"exact": NAME}}]


def test_the_one_outside_has_no_key_and_reads_no_http() -> None:
    text = text_of("passthrough.cfg")
    assert "mode tcp" in text
    assert not re.search(r"mode http|\bcrt\b|hdr\(|http-request", text)
    assert re.search(r"balance source\n\s+hash-type consistent", text)


@pytest.mark.parametrize("name", sorted(path.name for path in BALANCER.iterdir()))
def test_an_answer_is_waited_for(name: str) -> None:
    """One that is not streamed is silent until it is whole: longer than a stream, which has a comment every
    ``keep_alive_s``. OpenAI's clients wait 600 s.
    """
    waits = re.findall(r"(?:timeout (?:client|server)|proxy_read_timeout|stream_idle_timeout:) (\d+)s", text_of(name))
    assert waits
    assert min(map(int, waits)) >= 600 > 3 * ServerSettings.keep_alive_s
    if name.endswith(".yaml"):
        (chain,) = envoy()["listeners"][0]["filter_chains"]
        (host,) = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
        assert host["routes"][0]["route"]["timeout"] == "0s"  # none; without the line it is 15 s


def test_events_go_on_as_they_come() -> None:
    assert "proxy_buffering off;" in text_of("affinity.nginx.conf")


def test_a_connection_without_a_request_is_ended_by_the_balancer_before_the_server_does() -> None:
    """A request that is on its way when the server ends the connection fails."""
    (nginx,) = re.findall(r"(?m)^    keepalive_timeout (\d+)s;", text_of("affinity.nginx.conf"))
    (options,) = envoy()["clusters"][0]["typed_extension_protocol_options"].values()
    assert options["explicit_http_config"] == {"http_protocol_options": {}}  # HTTP/1.1, which the server speaks
    waits = [int(nginx), int(options["common_http_protocol_options"]["idle_timeout"].removesuffix("s"))]
    assert max(waits) < KEPT_S
    haproxy = text_of("affinity.cfg")
    assert re.search(r"(?m)^    option http-server-close$", haproxy)  # it has no limit of its own for these
    assert re.findall(r"timeout http-keep-alive (\d+)s", haproxy) == [str(KEPT_S)]  # its clients see no difference


def test_nothing_of_a_request_is_logged() -> None:
    assert "access_log off;" in text_of("affinity.nginx.conf")
    for path in HAPROXY:
        assert not re.search(r"(?m)^\s*(log|option httplog|option tcplog)\b", text_of(path.name))
    assert "access_log" not in str(envoy())


def test_what_they_ask_for_is_a_path_without_a_key() -> None:
    for path in HAPROXY:
        assert re.findall(r"uri (\S+)", text_of(path.name)) == ["/readyz"]
    (cluster,) = envoy()["clusters"]
    assert [check["http_health_check"]["path"] for check in cluster["health_checks"]] == ["/readyz"]
    assert "/readyz" in OPEN_PATHS


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="no haproxy here: install the package haproxy")
@pytest.mark.parametrize("path", HAPROXY, ids=lambda path: path.stem)
def test_haproxy_takes_it(path: Path, tmp_path: Path) -> None:
    pair, copy = key_pair(), tmp_path / path.name
    pair.write(tmp_path).rename(tmp_path / "balancer.pem")
    (tmp_path / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(pair.der))
    copy.write_text(path.read_text("utf-8").replace("/etc/tsqp", str(tmp_path)))
    done = subprocess.run(["haproxy", "-c", "-f", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
