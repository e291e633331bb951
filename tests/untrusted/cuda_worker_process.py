"""A worker in a process of its own that computes in its clients' device memory, over fakes of both drivers.

Usage: python -m tests.untrusted.cuda_worker_process MODEL ADDRESS. It says its address in JSON and ends with its input.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing

import torch

from tests.untrusted.fake_driver import FakeDriver
from tests.wire.fake_cuda import FakeIpc
from tsqp.checkpoint import open_checkpoint
from tsqp.untrusted.backends.cuda import CudaBackend
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.transport import listen


def main() -> None:
    model, address = sys.argv[1:]
    ipc = FakeIpc(opens_own_handles=False)
    backend = CudaBackend(FakeDriver(ipc=ipc))
    with closing(listen(address, driver=ipc, watch_fd=0)) as listener, closing(backend):
        worker = Worker(WeightStore(open_checkpoint(model), "float32", torch.device("cpu"), backend=backend))
        print(json.dumps({"address": listener.address}), flush=True)  # noqa: T201
        worker.serve(listener)


if __name__ == "__main__":
    main()
