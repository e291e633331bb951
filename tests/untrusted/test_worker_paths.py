"""What a worker computes in is asked for by its clients; its own --dtype is what it prepares before it listens."""

from __future__ import annotations

import pytest

from tests.commands import Home
from tsqp import LLM, ComputeConfig
from tsqp.errors import OptionError

TINY = ("--model", "synthetic:tiny", "--protection", "open", "--max-tokens", "4", "--json")


@pytest.mark.slow
def test_a_worker_of_the_field_path_serves_open_clients_too(home: Home) -> None:
    listen = f"ipc://{home.runtime}/worker.sock"
    with home.worker("--model", "synthetic:tiny", "--dtype", "field", "--listen", listen) as (_, address):
        for dtype in ("bfloat16", "int8"):
            done = home.run("generate", "hello", *TINY, "--dtype", dtype, "--worker", address)
            assert done.code == 0, done.err
            assert f"in {dtype} over ipc" in done.err
            assert len(done.json["token_ids"]) == 4


def test_compiling_the_field_path_is_refused() -> None:
    from tsqp.config.worker_options import parse_worker_options

    with pytest.raises(OptionError, match=r"--compile .*--dtype field"):
        parse_worker_options(["--model", "synthetic:tiny", "--dtype", "field", "--compile"])


def test_the_field_path_is_no_dtype_of_a_client() -> None:
    with pytest.raises(OptionError, match=r"compute\.dtype must be .*, not field"):
        LLM("synthetic:tiny", protection="open", compute=ComputeConfig(dtype="field"))  # type: ignore[arg-type]
