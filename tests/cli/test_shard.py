"""``tsqp worker --shard`` as a user has it: a process that holds the shard and says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.commands import Home, Result
from tests.families import tiny_model
from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import group_keys
from tsqp.config.shard import Shard
from tsqp.model.quantised import ShardDigests, load_quantised_group
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.wire.transport import connect

DIRECTORY = str(tiny_model("llama").directory)
SHARD = Shard(1, 3, 1, 2, 2)


def test_a_worker_of_a_shard_says_what_it_holds(home: Home) -> None:
    checkpoint = open_checkpoint(DIRECTORY)
    config = checkpoint.config
    digests = ShardDigests([SHARD], config)
    for key in group_keys(config):
        digests.add(key, load_quantised_group(checkpoint, key).wq)
    with home.worker("--model", DIRECTORY, "--threads", "1", "--shard", str(SHARD)) as (process, address):
        session = WorkerSession(
            connect(address),
            config,
            checkpoint.fingerprint(),
            wire_dtype="float32",
            dtype="float32",
            stats=Stats(),
            deadline_s=20.0,
            path="field",
            digests=digests.hexdigests()[SHARD],
            shard=SHARD,
        )
        session.ping()
        session.close()
        process.terminate()
        assert process.stderr is not None
        assert f"shard {SHARD} of {DIRECTORY} on cpu in field, listening on {address}" in process.stderr.read().decode()


@pytest.mark.parametrize("arguments", [["--dtype", "int8"], ["--compile"]])
def test_what_does_not_go_with_a_shard_is_a_wrong_option(arguments: list[str], tsqp: Callable[..., Result]) -> None:
    result = tsqp("worker", "--model", DIRECTORY, "--shard", "0..3", *arguments)
    assert result.code == 2
    assert "--shard" in result.error
