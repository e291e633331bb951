"""No value of an exception, nor of another package's record, is written."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys

import pytest

from tsqp.errors import PadsExhausted
from tsqp.server.discreet import DiscreetFormatter, told

SECRET = "canary-51c2"


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_an_exception_is_its_class_and_place() -> None:
    text = told(raised(ValueError(SECRET), raised(KeyError(SECRET))))
    assert SECRET not in text
    assert text.startswith("ValueError at test_discreet.py:")
    assert "; after KeyError at test_discreet.py:" in text


def test_our_own_exceptions_say_what_is_wrong() -> None:
    assert told(PadsExhausted("3 of 4 pads\nmissing")) == "PadsExhausted: 3 of 4 pads missing"


def test_a_long_chain_is_cut() -> None:
    error = ValueError(SECRET)
    for _ in range(50):
        error = raised(ValueError(SECRET), error)  # type: ignore[assignment]
    assert told(error).count("ValueError") == 4


def record(name: str, text: object, *args: object, error: Exception | None = None) -> str:
    about = None if error is None else (type(error), error, error.__traceback__)
    return DiscreetFormatter().format(logging.LogRecord(name, logging.ERROR, "x", 1, text, args, about))


def test_records_of_others_are_their_constant_part() -> None:
    assert record("uvicorn.error", "Invalid %s", SECRET).endswith("ERROR uvicorn.error: Invalid %s")
    assert record("uvicorn.error", ValueError(SECRET)).endswith("uvicorn.error: ValueError")
    assert record("tsqpx", "%s", SECRET).endswith("tsqpx: %s")
    assert record("tsqp.server", "%d keys", 3).endswith("tsqp.server: 3 keys")


def test_a_record_is_one_line_without_a_traceback() -> None:
    text = record("uvicorn.error", "Exception in ASGI application\n", error=raised(ValueError(SECRET)))
    assert "\n" not in text
    assert "Exception in ASGI application: ValueError at test_discreet.py:" in text
    assert SECRET not in text


CODE = f"""
import asyncio, gc, threading
from tsqp.server.discreet import log_of_loop, write_logs

def fail():
    local = "{SECRET}"
    raise ValueError(local)

class Finalised:
    def __del__(self):
        fail()

async def forgotten():
    fail()

async def main():
    asyncio.get_running_loop().set_exception_handler(log_of_loop)
    task = asyncio.create_task(forgotten())
    await asyncio.sleep(0)
    del task
    gc.collect()

write_logs()
threading.Thread(target=fail).start()
Finalised()
asyncio.run(main())
fail()
"""


def test_what_nobody_caught_is_told_without_values() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert SECRET not in run.stderr + run.stdout
    assert run.stderr.count("ValueError at <string>:7") == 4, run.stderr
    for place in ("in a thread", "in a finaliser", "never retrieved", "in the main thread"):
        assert place in run.stderr


def test_a_client_that_has_left_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    from tsqp.server.discreet import log_of_loop

    loop = asyncio.new_event_loop()
    log_of_loop(loop, {"message": "Fatal error", "exception": ConnectionResetError()})
    loop.close()
    assert not caplog.records
