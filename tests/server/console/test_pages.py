"""The page and its parts are files of the package, the same for everybody, and found by their names alone."""

from __future__ import annotations

import asyncio
import re
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from tests.commands import LIMIT_S
from tests.server.asgi import HOST, ask, error_of
from tests.server.console.watching import console_service
from tests.server.serving import Script, served, service_of
from tsqp import __version__
from tsqp.server.api_keys import KeyFile, add_line, line_for, new_key
from tsqp.server.app import create_app
from tsqp.server.console.pages import read_pages
from tsqp.server.health import Problem
from tsqp.server.settings import ServerSettings

STATIC = sorted(Path(str(files("tsqp.server.console") / "static")).iterdir())
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


class Fine:
    async def problem(self) -> Problem | None:
        return None


def app(keys: KeyFile | None = None) -> ASGIApp:
    return create_app(console_service(Script("Hi")), keys=keys, probe=Fine())


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyFile, str]:
    key = new_key()
    add_line(tmp_path / "keys", line_for("alice", key))
    return KeyFile(tmp_path / "keys"), key


@pytest.mark.parametrize("path", ["/", *(f"/console/{file.name}" for file in STATIC)])
def test_each_file_of_the_page_is_served_as_what_it_is(path: str) -> None:
    file = next(file for file in STATIC if file.name == (path.rpartition("/")[2] or "index.html"))
    answer = ask(app(), path)
    assert answer.status_code == 200
    assert answer.content == file.read_bytes()
    assert answer.headers["content-type"] == TYPES[file.suffix]
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == POLICY
    for name, value in {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }.items():
        assert answer.headers[name] == value
    assert "set-cookie" not in answer.headers


def test_the_page_names_nothing_of_another_origin() -> None:
    for file in STATIC:
        if file.suffix in (".html", ".css", ".js"):
            found = re.findall(r"""(?:src|href|url|from|import)\s*[=(]?\s*["']?(?:https?:)?//""", file.read_text())
            assert found == [], file.name


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/console",
        "/console/nothing.js",
        "/console/../console.py",
        "/console/%2e%2e/console.py",
        "/console/..%2fconsole.py",
        "/console/static/index.html",
        "/console/index.html%00",
        "//console/index.html",
        "/console//etc/passwd",
        "/console/INDEX.HTML",
    ],
)
def test_what_is_no_file_of_the_page_is_not_there(path: str) -> None:
    with served(console_service(Script("Hi"))) as url:
        client = httpx.Client(base_url=url)
        request = client.build_request("GET", "/")
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = client.send(request)
        client.close()
    assert answer.status_code == 404
    error_of(answer)


def test_a_head_has_the_headers_and_no_body() -> None:
    with served(console_service(Script("Hi"))) as url:
        for path in ("/", "/console/index.html"):
            head, whole = httpx.head(url + path), httpx.get(url + path)
            assert (head.status_code, head.content) == (200, b"")
            assert whole.content
            for name in ("content-length", "content-type", "content-security-policy"):
                assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/"), ("POST", "/console/index.html"), ("POST", "/console/about"), ("GET", "/console/answer")],
)
def test_another_method_is_refused(method: str, path: str) -> None:
    assert ask(app(), path, method=method).status_code == 405


@pytest.mark.parametrize("path", sorted({"/", "/console/index.html", "/console/about", "/console/answer"}))
def test_without_the_option_none_of_it_is_there(path: str) -> None:
    method = "POST" if path == "/console/answer" else "GET"
    answer = ask(create_app(service_of(Script("Hi")), probe=Fine()), path, method=method)
    assert answer.status_code == 404
    error_of(answer)


def test_the_page_needs_no_key_and_all_else_does(keys: tuple[KeyFile, str]) -> None:
    guarded, key = app(keys[0]), {"authorization": f"Bearer {keys[1]}"}
    for path in read_pages():
        assert ask(guarded, path).status_code == 200
    for path in ("/console/about", "/console/nothing.js", "/console/", "/v1/models"):
        assert ask(guarded, path).status_code == 401
    assert ask(guarded, "/console/answer", method="POST").status_code == 401
    assert ask(guarded, "/console/answer", method="POST", headers=key).status_code == 415
    assert ask(guarded, "/console/about", headers=key).json() == {
        "model": "tiny/chat",
        "protection": "local",
        "fingerprint": "tsqp-local-0123456789ab",
        "context": 2048,
        "version": __version__,
    }


def test_a_page_of_another_origin_gets_nothing() -> None:
    headers = {"origin": "https://evil.example"}
    for path in ("/", "/console/about"):
        assert ask(app(), path, headers=headers).status_code == 403
    assert ask(app(), "/", headers={"host": "evil.example"}).status_code == 421
    assert ask(app(), "/console/about", headers={"origin": "http://localhost"}).status_code == 200


def test_parts_of_the_page_do_not_count_as_requests_of_a_key() -> None:
    """A browser asks for all of them at once, also while an answer is under way."""

    async def test() -> None:
        more = asyncio.Event()
        service = console_service(Script([more]), settings=ServerSettings(max_requests_per_key=1))
        transport = httpx.ASGITransport(create_app(service, probe=Fine()))
        async with httpx.AsyncClient(transport=transport, base_url=HOST) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
            under_way = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while (await client.get("/v1/models")).status_code != 429:
                await asyncio.sleep(0.001)
            assert [(await client.get(path)).status_code for path in read_pages()] == [200] * len(read_pages())
            more.set()
            assert (await under_way).status_code == 200

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))
