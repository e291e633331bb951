"""CUDA IPC: tensors lie in one allocation of device memory that both sides have mapped. See ``docs/cuda-ipc.md``.

Covers: a worker that writes what it likes into the arena and answers with any bytes; a client that names any place,
size or handle; the death of either side. Does not cover: isolation. The worker reads and writes the arena at any time,
and computes on the device that the trusted process has a context on: nothing private may cross here, and private modes
refuse the address (tests/api/test_rules.py). Assumes: what ``shm`` assumes, and CUDA's driver.
"""

from tsqp.wire.transport.cuda.channel import connect_cuda
from tsqp.wire.transport.cuda.driver import IpcDriver
from tsqp.wire.transport.cuda.listener import listen_cuda

__all__ = ["IpcDriver", "connect_cuda", "listen_cuda"]
