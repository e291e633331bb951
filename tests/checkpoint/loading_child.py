"""A process that loads a checkpoint as one side does, and prints how much private memory that took: JSON, in bytes."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

import tests.cached_loops  # noqa: F401  (before anything that has loops)
from tsqp.api.freed_memory import give_back_freed_memory
from tsqp.arith.product import BlockedKernel
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.shard import Shard
from tsqp.model.decoder_layers import Norms
from tsqp.model.quantised import load_quantised_group
from tsqp.model.weights import ModelWeights
from tsqp.trusted.private import load_private_model
from tsqp.untrusted.paths.field import FieldWorkerWeights


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class Peak:
    """The most private memory that there was, looked at each millisecond."""

    def __init__(self) -> None:
        self.before = self.most = private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.001):
            self.most = max(self.most, private_bytes())

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.most - self.before


def load(checkpoint: Checkpoint, side: str) -> tuple[Any, int]:
    """What is kept, and how many bytes of tensors that is."""
    device = torch.device("cpu")
    if side in ("field", "quarter"):
        shard = Shard(0, checkpoint.config.num_layers + 1, 1, 2, 4) if side == "quarter" else None
        worker = FieldWorkerWeights.load(checkpoint, device, kernel=BlockedKernel(), shard=shard)
        return worker, sum(group.wq.nbytes for group in worker.groups.values())
    if side == "bfloat16":
        weights = ModelWeights.load(checkpoint, "bfloat16", device)
        return weights, sum(group.weight.nbytes for group in weights.groups.values())  # type: ignore[attr-defined]
    table, norms = checkpoint.copy("model.embed_tokens.weight"), Norms.load(checkpoint, torch.float32)
    model = load_private_model(checkpoint, table, norms, checks=2, keep_weights=True)
    kept = sum(group.weights.wq.nbytes for group in model.groups.values() if group.weights is not None)
    return (table, norms, model), kept + table.nbytes


def main(path: str, side: str) -> None:
    # What the first load of all brings along, libraries and loops, is no memory of weights.
    load(open_checkpoint("synthetic:tiny"), side)
    checkpoint = open_checkpoint(path)
    for name in ("gate_up", "down"):
        load_quantised_group(checkpoint, (name, 0))
    give_back_freed_memory()  # what the C library keeps for the next allocation is no memory of weights either
    peak = Peak()
    held, kept = load(checkpoint, side)
    give_back_freed_memory()
    after = private_bytes() - peak.before
    largest = max(4 * torch.Size(shape).numel() for shape in checkpoint.shapes.values())
    sys.stdout.write(json.dumps({"kept": kept, "after": after, "peak": peak.end(), "largest": largest}))
    del held


if __name__ == "__main__":
    main(*sys.argv[1:])
