"""``python -m tsqp.bench.origin_worker MODEL PATH THREADS``: the origin's worker, for ``bench origin`` alone.

A ZeroMQ REP socket; float32 weights; one product per request. It takes bytes from whoever can reach its socket, as the
origin did: it is a measuring device, not a worker.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
import zmq

from tsqp.bench.origin_wire import pack, unpack
from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import group_keys
from tsqp.model.linear import load_group


class OriginWorker:
    """Computes one request at a time."""

    def __init__(self, model: str) -> None:
        checkpoint = open_checkpoint(model)
        self._embedding = checkpoint.tensor("model.embed_tokens.weight").float()
        self._groups = {key: load_group(checkpoint, key, torch.float32) for key in group_keys(checkpoint.config)}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The product that a request asks for."""
        match request["op"]:
            case "embedding":
                return {"y": F.embedding(request["x"], self._embedding)}
            case "matmul":
                return {"y": torch.matmul(request["a"], request["b"])}
            case group:
                weights = self._groups[group, request["layer"]]
                return {"y": F.linear(request["x"], weights.weight, weights.bias)}


def main() -> None:
    """Bind, say where, answer until standard input ends."""
    model, path, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    worker = OriginWorker(model)
    os.umask(0o177)
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.linger = 0
        socket.bind(f"ipc://{path}")
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN | zmq.POLLERR)
        print(json.dumps({"address": path}), flush=True)  # noqa: T201
        with torch.inference_mode():
            while sys.stdin.fileno() not in dict(poller.poll()):
                socket.send(pack(worker.answer(unpack(socket.recv()))))


if __name__ == "__main__":
    main()
