"""The CPU: the memory that the transport gives is the memory that it computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from tsqp.arith.field import FieldWeights
from tsqp.arith.product import DigitKernel
from tsqp.untrusted.backends.base import Bind, Key, Place, Run
from tsqp.wire.payload import WireFormat, bytes_tensor, lies_in, tensor_bytes


class CpuBackend:
    """See Backend. Everything is done when a method returns, so there is nothing to settle."""

    device = torch.device("cpu")
    compiled_calls = True
    compiles_one_row = False  # too little to fuse: checking a graph's guards takes longer

    def serving(self) -> AbstractContextManager[None]:
        return nullcontext()

    def attach(self, peer: bytes, memory: memoryview) -> None: ...

    def detach(self, peer: bytes) -> None: ...

    def field_weights(self, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        return FieldWeights.of(wq, kernel)

    def stage_in(self, payload: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return bytes_tensor(payload, dtype, shape)

    def floats_in(
        self, payload: memoryview, wire: WireFormat, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        return wire.read(payload, shape, dtype)

    def place(self, out: memoryview | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor | None:
        return None if out is None else bytes_tensor(out, dtype, shape)

    def stage_out(self, product: torch.Tensor, out: memoryview | None) -> memoryview:
        return tensor_bytes(product) if out is None else out  # what has a place was computed there

    def floats_out(self, product: torch.Tensor, wire: WireFormat, out: memoryview | None) -> memoryview:
        shape = tuple(product.shape)
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
        source, target = bytes_tensor(*x), bytes_tensor(*y)
        if lies_in(source, x.memory) and lies_in(target, y.memory):
            return bind(source, target)
        return None  # memory at an odd address is copied before it is multiplied

    def settle(self) -> None: ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def trim(self) -> None: ...

    def close(self) -> None: ...
