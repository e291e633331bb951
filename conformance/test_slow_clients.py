"""Clients that are slow on purpose, by the hundred: others are served meanwhile, and the slow ones are cut off."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from openai import AsyncOpenAI

from conformance.target import Target

ATTACKERS = 300
HEAD_S = 10.0  # of the server: for headers to arrive

Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Target], Awaitable[None]]


async def slow_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target) -> None:
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
    for number in range(1000):
        writer.write(f"x-{number}: 1\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.5)


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {target.key}\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: 100000\r\n\r\n".encode())
    for _ in range(1000):
        writer.write(b"{")
        await writer.drain()
        await asyncio.sleep(0.5)


async def slow_reading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target) -> None:
    """Twenty lists of models, of which it takes a byte now and then."""
    head = f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {target.key}\r\n\r\n".encode()
    writer.write(head * 20)
    for _ in range(1000):
        await reader.read(1)
        await asyncio.sleep(0.5)


async def attacker(target: Target, attack: Attack) -> bool:
    """Whether the server has ended it."""
    place = urlsplit(target.url)
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # what is not read stays with the server
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, (place.hostname, place.port))
    reader, writer = await asyncio.open_connection(sock=narrow, limit=1)
    try:
        await attack(reader, writer, target)
    except (ConnectionError, OSError):
        return True
    finally:
        writer.transport.abort()
    return False


@pytest.mark.parametrize("attack", [slow_headers, slow_body, slow_reading])
def test_others_are_served_meanwhile(target: Target, attack: Attack) -> None:
    async def run() -> list[bool | BaseException]:
        tasks = [asyncio.create_task(attacker(target, attack)) for _ in range(ATTACKERS)]
        await asyncio.sleep(1)
        async with AsyncOpenAI(base_url=target.api, api_key=target.key, max_retries=0, timeout=10) as client:
            for _ in range(20):
                assert [model.id async for model in await client.models.list()] == [target.model]
                answer = await client.chat.completions.create(
                    model=target.model, messages=[{"role": "user", "content": "Hello?"}], max_tokens=8
                )
                assert answer.usage is not None
                await asyncio.sleep(0.1)
        if attack is slow_headers:
            async with asyncio.timeout(3 * HEAD_S):
                return await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ended = asyncio.run(run())
    if attack is slow_headers:
        assert ended == [True] * ATTACKERS


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install {name}")
    return found


@pytest.mark.parametrize("mode", ["-H", "-B", "-X"])
def test_slowhttptest_finds_the_service_available(target: Target, mode: str) -> None:
    """Slow headers, slow bodies, slow reading; the tool itself asks every second whether others are served."""
    path = "/v1/models" if mode == "-X" else "/v1/chat/completions"
    more = ["-w", "1", "-y", "10", "-n", "2", "-z", "1", "-k", "5"] if mode == "-X" else ["-i", "2", "-x", "8"]
    done = subprocess.run(
        [tool("slowhttptest"), mode, "-c", "300", "-r", "200", "-l", "15", "-p", "3", *more, "-u", target.url + path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "service available" in done.stdout
    states = [line for line in done.stdout.splitlines() if "service available" in line]
    assert states
    assert all("YES" in line for line in states), done.stdout


def test_hey_gets_an_answer_to_each_request(target: Target, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_text(json.dumps({"model": target.model, "prompt": "Hello?", "max_tokens": 4}))
    asked = [tool("hey"), "-n", "400", "-c", "32", "-m", "POST", "-T", "application/json", "-D", str(body)]
    asked += ["-H", f"Authorization: Bearer {target.key}", f"{target.api}/completions"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert "[200]\t384 responses" in done.stdout or "[200]\t400 responses" in done.stdout, done.stdout
    assert "Error distribution" not in done.stdout


def test_wrk_gets_an_answer_to_each_request(target: Target) -> None:
    asked = [tool("wrk"), "-t", "1", "-c", "64", "-d", "5s", "--timeout", "10s"]
    asked += ["-H", f"Authorization: Bearer {target.key}", f"{target.api}/models"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    assert "requests in" in done.stdout
    assert "Non-2xx" not in done.stdout, done.stdout
    assert "Socket errors" not in done.stdout, done.stdout
