"""``tsqp serve --console`` as a process: its page, its key, what it sees in clear, and what it writes nowhere."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.commands import LIMIT_S, Home
from tests.server.chat_model import IM_END, chat_model
from tests.server.console.watching import URL, named_events
from tests.server.process import serving
from tsqp.server.api_keys import add_line, line_for, new_key

CANARY = "xylophone7f3a"
BODY: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": CANARY}],
    "max_tokens": 8,
    "logit_bias": {str(IM_END): -100},
    "stream": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["open", "masked"])
def test_the_page_is_there_and_the_log_has_no_word_of_what_was_asked(
    home: Home, tmp_path: Path, protection: str
) -> None:
    key = new_key()
    add_line(tmp_path / "keys", line_for("alice", key))
    options = ("--model", chat_model(), "--served-model-name", "chat", "--protection", protection, "--threads", 1)
    with serving(home, *options, "--console", "--port", 0, "--api-keys", tmp_path / "keys") as server:
        with httpx.Client(base_url=server.address, timeout=LIMIT_S) as client:
            assert client.get("/").status_code == 200
            assert client.get("/console/about").status_code == client.post(URL, json=BODY).status_code == 401
            client.headers["authorization"] = f"Bearer {key}"
            about = client.get("/console/about").json()
            assert (about["model"], about["protection"]) == ("chat", protection)
            seen = dict(named_events(client.post(URL, json=BODY).text))["seen"]
            assert (seen["recovered_text"] == CANARY) == (protection == "open")
            assert seen["user_tokens"] == len(CANARY)
            with client.stream("POST", URL, json={**BODY, "max_tokens": 1000}) as answer:
                assert next(answer.iter_lines())  # left in the middle
            assert client.post(URL, json={**BODY, "stream": False}).status_code == 400
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
    written = "".join(server.log)
    assert f"console at {server.address}/" in written
    assert CANARY not in written
    assert seen["recovered_text"] not in written
    assert home.leftovers() == []
