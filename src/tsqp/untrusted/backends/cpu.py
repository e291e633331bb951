"""The CPU: the memory that the transport gives is the memory that it computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from tsqp.arith.field import FieldWeights
from tsqp.arith.product import DigitKernel
from tsqp.untrusted.backends.base import NOTHING_QUEUED, Bind, Key, NothingQueued, Place, Run
from tsqp.wire.device_memory import Payload, on_the_host
from tsqp.wire.payload import WireFormat, bytes_tensor, lies_in, tensor_bytes


class CpuBackend:
    """See Backend. Everything is done when a method returns, so there is nothing to settle."""

    device = torch.device("cpu")
    compiled_calls = True
    failed = "cpu"
    captures = False
    depth = 1
    compiles_one_row = False  # too little to fuse: checking a graph's guards takes longer

    def serving(self) -> AbstractContextManager[None]:
        return nullcontext()

    def attach(self, peer: bytes, memory: memoryview) -> None: ...

    def detach(self, peer: bytes) -> None: ...

    def field_weights(self, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        return FieldWeights.of(wq, kernel)

    def host_copy(self, payload: Payload) -> memoryview:
        return _host(payload)

    def stage_in(self, payload: Payload, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return bytes_tensor(_host(payload), dtype, shape)

    def floats_in(self, payload: Payload, wire: WireFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return wire.read(_host(payload), shape, dtype)

    def place(self, out: Payload | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor | None:
        return None if out is None else bytes_tensor(_host(out), dtype, shape)

    def stage_out(self, product: torch.Tensor, out: Payload | None) -> Payload:
        return tensor_bytes(product) if out is None else out  # what has a place was computed there

    def floats_out(self, product: torch.Tensor, wire: WireFormat, out: Payload | None) -> Payload:
        shape = tuple(product.shape)
        out = None if out is None else _host(out)
        if out is None:
            if product.dtype == wire.dtype:
                return tensor_bytes(product.contiguous())
            out = tensor_bytes(torch.empty(wire.size(shape), dtype=torch.uint8))
        elif wire.dtype is not None:
            place = bytes_tensor(out, wire.dtype, shape)
            if place.data_ptr() == product.data_ptr():
                return out
        wire.write(product, out)
        return out

    def prepare(self, key: Key, x: Place, y: Place, bind: Bind) -> Run | None:
        here, there = _host(x.memory), _host(y.memory)
        source, target = bytes_tensor(here, *x[1:]), bytes_tensor(there, *y[1:])
        if lies_in(source, here) and lies_in(target, there):
            return bind(source, target)
        return None  # memory at an odd address is copied before it is multiplied

    def stage_into(self, payload: memoryview, memory: torch.Tensor) -> None:
        memory.copy_(bytes_tensor(payload, memory.dtype, tuple(memory.shape)))

    def captured(self, work: Run) -> Run:
        return work

    def submit(self) -> NothingQueued:
        return NOTHING_QUEUED

    def settle(self) -> None: ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def works(self) -> bool:
        return True

    def trim(self) -> None: ...

    def close(self) -> None: ...


def _host(payload: Payload) -> memoryview:
    return on_the_host(payload, "the CPU")
