"""``tsqp serve`` as its operator meets it: what is refused in one line, how it ends, what it leaves."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.commands import LIMIT_S, Home, Result
from tests.families import tiny_model
from tests.server.chat_model import chat_model
from tests.server.process import serving
from tsqp.cli.commands import app
from tsqp.cli.options import RunOptions
from tsqp.cli.serve import ServeOptions
from tsqp.server.api_keys import KeyFile
from tsqp.server.listening import bind_unix

MODEL = ("--model", str(tiny_model("llama").directory))
OPEN = (*MODEL, "--protection", "open", "--dtype", "float32")
Command = Callable[..., Result]
JSON = {"content-type": "application/json"}


@pytest.fixture
def _nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.api.parties.LocalWorker", None)
    monkeypatch.setattr("tsqp.server.run.write_logs", lambda _: None)


@pytest.mark.usefixtures("_nothing_is_started")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--port", "65536"), "--port"),
        (("--metrics-port", "-1"), "--metrics-port"),
        (("--max-waiting", "0"), "--max-waiting"),
        (("--max-running", "0"), "--max-running"),
        (("--max-body", "0"), "--max-body"),
        (("--max-body", "many"), "--max-body"),
        (("--max-connections", "0"), "--max-connections"),
        (("--max-requests-per-key", "0"), "--max-requests-per-key"),
        (("--drain-s", "-1"), "--drain-s"),
        (("--drain-s", "nan"), "--drain-s"),
        (("--allow-origin", "*"), "--allow-origin"),
        (("--allow-origin", "https://a.example/path"), "--allow-origin"),
        (("--served-model-name", ""), "--served-model-name"),
        (("--host", "0.0.0.0"), "--api-keys and --tls-cert"),
        (("--host", "0.0.0.0"), "--insecure-exposed"),
        (("--tls-cert", "c"), "--tls-key"),
        (("--host", "203.0.113.1", "--insecure-exposed"), "--host"),
        (("--frobnicate",), "--frobnicate"),
        (("--protection", "local", "--worker", "ipc:///x"), "--worker"),
        (("--console", "--protection", "open", "--partition", "op", "--port", "0"), "--partition linear"),
    ],
    ids=lambda one: "-".join(one)[:40] if isinstance(one, tuple) else one[:20],
)
def test_a_wrong_option_is_one_line(tsqp: Command, options: tuple[str, ...], named: str) -> None:
    result = tsqp("serve", *MODEL, *options)
    assert result.code == 2
    assert named in result.error
    assert "server." not in result.error


@pytest.mark.usefixtures("_nothing_is_started")
def test_a_port_in_use_is_one_line_before_anything_is_loaded(tsqp: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        result = tsqp("serve", "--model", "/nowhere", "--port", held.getsockname()[1])
    assert result.code == 1
    assert "is in use" in result.error
    assert "--port" in result.error


@pytest.mark.usefixtures("_nothing_is_started")
def test_a_file_of_keys_that_others_can_read_is_refused(tsqp: Command, tmp_path: Path) -> None:
    (tmp_path / "keys").touch(0o644)
    (tmp_path / "keys").chmod(0o644)
    result = tsqp("serve", *MODEL, "--port", 0, "--api-keys", tmp_path / "keys")
    assert result.code == 1
    assert "chmod 600" in result.error


def serve_options(*arguments: str) -> tuple[str, ServeOptions]:
    """Protection, and the options of the server."""
    _, bound, _ = app.parse_args(["serve", *arguments], exit_on_error=False, print_error=False)
    return bound.arguments.get("run", RunOptions()).protection, bound.arguments.get("server", ServeOptions())


def test_flags_win_over_variables_and_the_mode_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TSQP_", "LLAMA_"))]:
        monkeypatch.delenv(name)
    assert serve_options() == ("masked", ServeOptions())
    for name, value in {"TSQP_PORT": "1", "TSQP_MAX_WAITING": "2", "TSQP_MAX_BODY": "1MiB"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TSQP_INSECURE_EXPOSED", "1")
    monkeypatch.setenv("TSQP_CONSOLE", "1")
    _, options = serve_options("--port", "3")
    assert (options.port, options.max_waiting, options.max_body) == (3, 2, 1 << 20)
    # What weakens a server, or shows more of it, is said on its command line.
    assert (options.insecure_exposed, options.console) == (False, False)
    assert serve_options("--console")[1].console


def test_a_server_has_few_heaps_before_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread's own heap keeps what that thread freed: a server that loses workers would seem to grow."""
    done = list[str]()
    monkeypatch.setattr("tsqp.cli.serve.few_heaps", lambda: done.append("heaps"))
    monkeypatch.setattr("tsqp.server.run.serve", lambda *arguments, **options: done.append("served"))
    command, bound, _ = app.parse_args(["serve"], exit_on_error=False, print_error=False)
    command(*bound.args, **bound.kwargs)
    assert done == ["heaps", "served"]


def test_a_fresh_key_is_shown_once_and_lets_its_owner_in(tsqp: Command, tmp_path: Path) -> None:
    shown = tsqp("api-key", "alice").out
    key, line = (text.split(": ")[-1] for text in shown.splitlines())
    stored = tsqp("api-key", "bob", "--file", tmp_path / "keys").out
    other = stored.splitlines()[0].split(": ")[-1]
    assert other not in (tmp_path / "keys").read_text()
    with (tmp_path / "keys").open("a") as file:
        file.write(line + "\n")
    keys = KeyFile(tmp_path / "keys")
    assert (keys.tenant_of(key), keys.tenant_of(other)) == ("alice", "bob")
    assert tsqp("api-key", "a:b").code == 2


def client_of(address: str) -> httpx.Client:
    """Of a server on a port, or on a socket in the file system."""
    path = address.removeprefix("unix:")
    if path == address:
        return httpx.Client(base_url=address, timeout=LIMIT_S)
    return httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://localhost", timeout=LIMIT_S)


BODY = {"model": "llama", "prompt": "hello", "temperature": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_files", "protection"),
    [(False, OPEN[-4:]), (True, ("--protection", "masked"))],
    ids=["port, open", "socket, masked"],
)
def test_killed_and_started_again_at_once_on_the_same_addresses(
    home: Home, in_files: bool, protection: tuple[str, ...]
) -> None:
    """In the middle of a stream, with clients of both addresses that stay connected. Nobody ends its worker."""
    options = (*MODEL, *protection, "--served-model-name", "llama", "--drain-s", "5")
    at: tuple[object, ...] = ("--unix-socket", home.runtime / "api.sock") if in_files else ("--port", 0)
    with ExitStack() as clients, serving(home, *options, *at, "--metrics-port", 0) as first:
        assert first.metrics_address is not None
        client = clients.enter_context(client_of(first.address))
        text = client.post("/v1/completions", json={**BODY, "max_tokens": 4}).json()["choices"][0]["text"]
        page = clients.enter_context(httpx.Client(timeout=LIMIT_S))
        assert page.get(first.metrics_address).status_code == 200  # and the connection stays
        stream = {**BODY, "max_tokens": 200, "n": 16, "stream": True, "ignore_eos": True}
        answer = clients.enter_context(client.stream("POST", "/v1/completions", json=stream))
        lines = answer.iter_lines()
        next(lines)
        first.process.kill()
        assert first.ended() == -signal.SIGKILL
        metrics_port = httpx.URL(first.metrics_address).port
        at = at if in_files else ("--port", httpx.URL(first.address).port)
        with serving(home, *options, *at, "--metrics-port", metrics_port) as second:
            assert (second.address, second.metrics_address) == (first.address, first.metrics_address)
            with client_of(second.address) as again:
                answered = again.post("/v1/completions", json={**BODY, "max_tokens": 4})
            assert answered.json()["choices"][0]["text"] == text
            assert "tsqp:requests_added_total" in httpx.get(first.metrics_address, timeout=LIMIT_S).text
            with pytest.raises(httpx.TransportError):
                list(lines)
            second.process.send_signal(signal.SIGTERM)
            assert second.ended() == 0
    assert home.leftovers() == []
    assert any(line.startswith("ready in ") and second.address in line for line in second.log)
    assert any(re.match(r"read (no file|1 file of \d+\.\d\d GB) in \d", line) for line in second.log)
    assert not any("Traceback" in line for line in second.log)


def test_a_second_signal_ends_at_once_though_a_worker_is_silent(home: Home) -> None:
    with serving(home, *OPEN, "--served-model-name", "llama", "--port", 0, "--drain-s", "600") as server:
        assert server.worker is not None
        os.kill(server.worker, signal.SIGSTOP)
        server.process.send_signal(signal.SIGINT)
        while httpx.get(f"{server.address}/readyz", timeout=LIMIT_S).json()["code"] != "shutting_down":
            pass  # the worker does not let itself be stopped, so the end takes seconds
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 128 + signal.SIGTERM


def test_an_end_at_once_leaves_the_socket_of_a_successor(home: Home) -> None:
    path = home.runtime / "api.sock"
    with serving(home, *OPEN, "--served-model-name", "llama", "--unix-socket", path, "--drain-s", "600") as server:
        assert server.worker is not None
        os.kill(server.worker, signal.SIGSTOP)
        path.unlink()
        with bind_unix(path):
            for number in (signal.SIGINT, signal.SIGTERM):
                server.process.send_signal(number)
            assert server.ended() in (128 + signal.SIGINT, 128 + signal.SIGTERM)  # they may come in any order
            assert path.exists()
    path.unlink()


@pytest.mark.slow
def test_the_first_try_of_the_usage_page_works(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """In the mode that it is in unless told otherwise: what curl sends, and what OpenAI's client does."""
    page = (Path(__file__).parents[2] / "docs" / "usage.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "openai" in block)
    (body,) = re.findall(r"-d '(.*)'", page)
    (path,) = re.findall(r"curl http://127\.0\.0\.1:8000(\S+)", page)
    with serving(home, "--model", chat_model(), "--served-model-name", "default", "--port", 0) as server:
        answer = httpx.post(f"{server.address}{path}", content=body, headers=JSON, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-tsqp-protection"] == "masked"
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
        code = code.replace("http://127.0.0.1:8000", server.address).replace("stream=True", "stream=True, max_tokens=8")
        exec(compile(code, "usage.md", "exec"), {})
    assert capsys.readouterr().out
