"""A server in this process, told to end while it answers; keys and certificate that change meanwhile."""

from __future__ import annotations

import datetime
import os
import select
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.commands import LIMIT_S
from tests.families import tiny_model
from tests.fresh_interpreter import loaded, modules_after
from tests.server.running import Server
from tsqp import LLM, ComputeConfig, WorkerConfig
from tsqp.server.api_keys import add_line, line_for, new_key
from tsqp.server.listening import Listening
from tsqp.server.ready import Ready, since_start_s, url
from tsqp.server.run import Running
from tsqp.server.settings import ServerSettings

MODEL = str(tiny_model("llama").directory)
BODY = {"model": "tiny", "prompt": "The quick brown fox", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    codes: list[int] = []
    monkeypatch.setattr("tsqp.server.run.write_logs", lambda _: None)
    monkeypatch.setattr(Running, "_end_at_once", lambda _, code: codes.append(code))
    llm, gate = LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32")), threading.Event()
    gate.set()
    decoder: Any = llm.engine.decoder
    forward = decoder.forward

    def when_the_gate_is_open(batch: Any) -> Any:
        assert gate.wait(LIMIT_S)
        return forward(batch)

    monkeypatch.setattr(decoder, "forward", when_the_gate_is_open)
    with llm:
        yield Server(llm, gate, codes)


def completion(ready: Ready, **more: Any) -> httpx.Response:
    return httpx.post(f"{ready.address}/v1/completions", json={**BODY, **more}, timeout=LIMIT_S)


def metric(ready: Ready, name: str) -> float:
    assert ready.metrics_address is not None
    lines = httpx.get(ready.metrics_address, timeout=LIMIT_S).text.splitlines()
    return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])


def wait_for_running(ready: Ready, count: int) -> None:
    while metric(ready, "vllm:num_requests_running") != count:
        pass


@pytest.mark.slow
def test_a_connection_is_kept_longer_than_clients_keep_it(server: Server) -> None:
    """httpx sends on one that has been idle for up to 5 s, aiohttp up to 15: the server is not the first to end it."""

    def client(ready: Ready) -> None:
        at = urlsplit(ready.address)
        with socket.create_connection((at.hostname, at.port), timeout=LIMIT_S) as connection:
            for idle_s in (16.0, 0.0):
                connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
                while select.select([connection], [], [], idle_s)[0]:
                    assert connection.recv(1 << 16)  # of the answer; nothing would be the end

    server.run(client)


def told_to_end(ready: Ready) -> httpx.Response:
    """The first answer of readiness that says so."""
    os.kill(os.getpid(), signal.SIGTERM)
    while (answer := httpx.get(f"{ready.address}/readyz", timeout=LIMIT_S)).status_code == 200:
        pass
    return answer


def test_answers_under_way_are_finished_and_nothing_new_begins(server: Server) -> None:
    def client(ready: Ready) -> None:
        whole = completion(ready).json()["choices"][0]["text"]
        server.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(completion, ready)
            wait_for_running(ready, 1)
            not_ready = told_to_end(ready)
            assert (not_ready.status_code, not_ready.json()["code"]) == (503, "shutting_down")
            assert httpx.get(f"{ready.address}/livez", timeout=LIMIT_S).status_code == 200
            refused = completion(ready)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) >= 1
            server.gate.set()
            assert under_way.result().json()["choices"][0]["text"] == whole

    server.run(client)
    assert server.ended_at_once in ([], [128 + signal.SIGTERM])  # the signal at the end of the client


def test_what_is_not_finished_in_time_ends_with_an_error(server: Server) -> None:
    def client(ready: Ready) -> None:
        server.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            streamed, plain = pool.submit(completion, ready, stream=True), pool.submit(completion, ready)
            while metric(ready, "tsqp:requests_added_total") != 2:
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            stream = streamed.result()
            assert stream.status_code == 200
            assert '"error"' in stream.text
            assert "[DONE]" not in stream.text
            assert plain.result().status_code == 503
            server.gate.set()

    server.run(client, settings=ServerSettings(drain_s=0.0))


def test_a_worker_that_does_not_answer_does_not_keep_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.server.run.STUCK_S", 0.01)

    def client(ready: Ready) -> None:
        server.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(completion, ready)
            wait_for_running(ready, 1)
            os.kill(os.getpid(), signal.SIGTERM)
            while not server.ended_at_once:
                pass
            server.gate.set()
            assert under_way.result().status_code == 503

    server.run(client, settings=ServerSettings(drain_s=0.0))
    assert server.ended_at_once[0] == 1


def test_an_answer_names_the_mode_and_a_metric_counts_it(server: Server) -> None:
    def client(ready: Ready) -> None:
        assert (ready.model, ready.protection) == ("tiny", "local")
        assert 0 < ready.ready_s < 3600
        answer = completion(ready)
        assert answer.headers["x-tsqp-protection"] == "local"
        assert answer.json()["system_fingerprint"].startswith("tsqp-local-")
        assert "server" not in answer.headers
        assert metric(ready, "vllm:generation_tokens_total") == 12
        assert metric(ready, "vllm:time_to_first_token_seconds_count") == 1
        assert (
            httpx.get(str(ready.metrics_address), headers={"host": "evil.example"}, timeout=LIMIT_S).status_code == 421
        )
        assert httpx.get(f"{ready.address}/metrics", timeout=LIMIT_S).status_code == 404

    server.run(client)


def test_a_key_that_is_taken_out_of_the_file_lets_nobody_in(server: Server, tmp_path: Path) -> None:
    path, key = tmp_path / "keys", new_key()
    add_line(path, line_for("alice", key))
    add_line(path, line_for("bob", new_key()))

    def client(ready: Ready) -> None:
        headers = {"authorization": f"Bearer {key}"}
        models = f"{ready.address}/v1/models"
        assert httpx.get(models, timeout=LIMIT_S).status_code == 401
        assert httpx.get(models, headers=headers, timeout=LIMIT_S).status_code == 200
        assert httpx.get(f"{ready.address}/readyz", timeout=LIMIT_S).status_code == 200
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        os.kill(os.getpid(), signal.SIGHUP)
        while httpx.get(models, headers=headers, timeout=LIMIT_S).status_code == 200:
            pass
        assert httpx.get(models, headers=headers, timeout=LIMIT_S).status_code == 401

    server.run(client, api_keys=path)


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = directory / "cert.pem", directory / "key.pem"
    cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.touch(0o600)
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return cert_path, key_path


def test_tls_and_a_certificate_that_is_renewed(server: Server, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "first")

    def trusting() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(cert))

    def client(ready: Ready) -> None:
        assert ready.address.startswith("https://localhost:")
        first = trusting()
        assert httpx.get(f"{ready.address}/readyz", verify=first, timeout=LIMIT_S).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http{ready.address.removeprefix('https')}/readyz", timeout=LIMIT_S)
        certificate(tmp_path, "second")
        os.kill(os.getpid(), signal.SIGHUP)
        renewed = False
        while not renewed:
            try:
                renewed = httpx.get(f"{ready.address}/readyz", verify=trusting(), timeout=LIMIT_S).status_code == 200
            except httpx.ConnectError:  # not yet read
                continue
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{ready.address}/readyz", verify=first, timeout=LIMIT_S)

    server.run(client, listening=Listening(host="localhost", port=0, tls_cert=cert, tls_key=key))


def test_a_certificate_without_its_key_changes_nothing(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The two are written one after the other, so a server that is told too soon reads halves of two pairs."""
    cert, key = certificate(tmp_path, "first")
    (tmp_path / "second").mkdir()
    other, other_key = certificate(tmp_path / "second", "second")
    first, second = ssl.create_default_context(cafile=str(cert)), ssl.create_default_context(cafile=str(other))

    def told(count: int) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        while sum("the certificate was not read again" in record.getMessage() for record in caplog.records) < count:
            pass

    def client(ready: Ready) -> None:
        halves = (cert, other.read_bytes()), (key, other_key.read_bytes())
        for count, (path, half) in enumerate(halves, start=1):
            whole = path.read_bytes()
            path.write_bytes(half)
            told(count)
            assert httpx.get(f"{ready.address}/readyz", verify=first, timeout=LIMIT_S).status_code == 200
            path.write_bytes(whole)
        for path, half in halves:
            path.write_bytes(half)
        os.kill(os.getpid(), signal.SIGHUP)
        renewed = False
        while not renewed:
            try:
                renewed = httpx.get(f"{ready.address}/readyz", verify=second, timeout=LIMIT_S).status_code == 200
            except httpx.ConnectError:  # not yet read
                continue
        assert "do not belong together" in caplog.text

    server.run(client, listening=Listening(host="localhost", port=0, tls_cert=cert, tls_key=key))


def test_a_socket_in_the_file_system(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "tsqp.sock"

    def client(ready: Ready) -> None:
        assert ready.address == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as over_socket:
            assert over_socket.get("/readyz").status_code == 200

    server.run(client, listening=Listening(unix_socket=path))
    assert not path.exists()


@pytest.mark.slow
def test_readiness_follows_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, going on, killed with nobody to wait for: each shows, and none keeps the server from ending."""
    monkeypatch.setattr("tsqp.server.run.write_logs", lambda _: None)
    monkeypatch.setattr(Running, "_end_at_once", lambda _, code: None)
    llm = LLM(MODEL, protection="verified", worker=WorkerConfig(patience_s=0))
    worker = llm.worker_pid
    assert worker is not None

    def wait_for(ready: Ready, code: str | None) -> None:
        while httpx.get(f"{ready.address}/readyz", timeout=LIMIT_S).json().get("code") != code:
            pass

    def client(ready: Ready) -> None:
        wait_for(ready, None)
        os.kill(worker, signal.SIGSTOP)
        wait_for(ready, "worker_silent")
        assert httpx.get(f"{ready.address}/livez", timeout=LIMIT_S).status_code == 200
        os.kill(worker, signal.SIGCONT)
        wait_for(ready, None)
        os.kill(worker, signal.SIGKILL)
        wait_for(ready, "worker_lost")
        assert metric(ready, "tsqp:worker_up") == 0
        lost = completion(ready)
        assert (lost.status_code, lost.json()["error"]["type"]) == (503, "server_error")

    with llm:
        Server(llm, threading.Event(), []).run(client, settings=ServerSettings(probe_s=0.2))


def test_torch_is_loaded_with_the_model_and_not_before() -> None:
    """A port in use is known at once, and a worker loads it at the same time."""
    modules = modules_after("import tsqp.server.run")
    assert not loaded(modules, "torch")
    assert not loaded(modules, "tsqp.audit"), "the console alone needs it"


def test_how_an_address_is_written() -> None:
    assert url("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert url("::1", 8000, tls=True) == "https://[::1]:8000"
    assert 0 < since_start_s() < 86_400
