"""The ways calls travel. The scheme of an address picks one; nothing falls back to another."""

from tsqp.wire.transport.endpoints import connect, listen
from tsqp.wire.transport.runtime_dir import new_cuda_address, new_ipc_address, new_shm_address

__all__ = ["connect", "listen", "new_cuda_address", "new_ipc_address", "new_shm_address"]
