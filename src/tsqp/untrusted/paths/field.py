"""The field path of a worker: exact products mod p with 8-bit weights, see ``docs/masking.md`` §2 and §6.

Integers in, integers out: scales and biases stay with the trusted side. What a client sends may be any bytes: numbers
that are not canonical give products that mean nothing, to that client alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream, expand
from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.field import Digits, FieldWeights
from tsqp.arith.product import BlockedKernel, DigitKernel
from tsqp.arith.self_test import pick_kernel
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import ComputeDtype
from tsqp.config.groups import GroupKey, GroupName
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, whole
from tsqp.errors import ProtocolError
from tsqp.model.quantised import GroupDigests, load_quantised_group
from tsqp.untrusted.backends.base import Backend, Place, Run
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.paths.plain import check_frame, exactly
from tsqp.untrusted.paths.prepared import Prepared
from tsqp.wire.device_memory import Payload
from tsqp.wire.messages import Call, MultiplyPads, Product
from tsqp.wire.payload import bytes_tensor, tensor_bytes

DEALT_BLOCKS = 16  # at a time: what is expanded of a large call stays small

BOTH_DIGITS: tuple[Digits, ...] = (2, 4)


@dataclass(frozen=True)
class FieldWorkerWeights:
    """8-bit weights of every group of a shard on one device, and the digests that a client compares with its own."""

    config: ModelConfig
    device: torch.device
    groups: Mapping[GroupKey, FieldWeights]
    digests: Mapping[GroupName, str]
    shard: Shard

    compute: ComputeDtype = "field"

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        kernel: DigitKernel | None = None,
        backend: Backend | None = None,
        shard: Shard | None = None,
    ) -> FieldWorkerWeights:
        """Read and quantise every group, or a shard's slices; ``kernel`` is chosen by a self-test unless given.

        Compiles the loops, so that no call waits for it. Raises CheckpointError.
        """
        kernel = kernel or pick_kernel(device)
        backend = backend or CpuBackend()
        shard = shard or whole(checkpoint.config)
        digests = GroupDigests(shard.first)
        groups = {}
        for key in shard.keys(checkpoint.config):
            wq = load_quantised_group(checkpoint, key, shard).wq
            digests.add(key, wq)
            groups[key] = backend.field_weights(wq, kernel)
        compile_loops(kernel if backend.compiled_calls else BlockedKernel())  # a device's kernel has none
        return cls(checkpoint.config, device, groups, digests.hexdigests(), shard)


def compile_loops(kernel: DigitKernel) -> None:
    """Have numba compile every loop that calls need, by small products and a small expansion on the CPU."""
    wq = torch.ones(8, 8, dtype=torch.int8)
    weights = FieldWeights.of(wq, BlockedKernel())  # the loops are those of any kernel, but for what it does at once
    for digits in BOTH_DIGITS:
        x = torch.zeros(2, 8, dtype=_input_dtype(digits))
        weights.product(x, digits, out=torch.empty(2, 8, dtype=torch.int32))
        if kernel.at_once(len(x) * digits):
            FieldWeights.of(wq, kernel).product(x, digits, out=torch.empty(2, 8, dtype=torch.int32))
            prepared(FieldWeights.of(wq, kernel), x, digits, torch.empty(2, 8, dtype=torch.int32))()
        # Wide products are written in blocks of columns, which numba compiles apart: rows that do not follow closely.
        weights.product(x, digits, out=torch.empty(2, 16, dtype=torch.int32)[:, :8])
    expand(AesKeyStream(bytes(KEY_BYTES)), np.empty((1, 8), np.uint32))


class FieldOperators:
    """Computes the calls of one connection: products of numbers that are sent, or of a dealer's expanded keys.

    ``backend`` is that of the device which the weights are on: its ``submit`` or ``settle`` ends a call.
    """

    keeps_state = False  # nothing outlives a call

    def __init__(self, weights: FieldWorkerWeights, backend: Backend | None = None) -> None:
        self._weights = weights
        self._backend = backend or CpuBackend()
        self.prepared = Prepared()

    def __call__(
        self, call: Call, payloads: Sequence[Payload], out: Payload | None = None, place: bytes = b""
    ) -> Payload:
        """The product of one call, in ``out`` where that is given. ``place`` is that of ``Arrival``.

        Raises ProtocolError for a call of another path, or one that does not fit the model, its payload or the room
        for its product.
        """
        if not isinstance(call, Product | MultiplyPads):
            kind = type(call).__struct_config__.tag
            raise ProtocolError(f"this connection is of the field path: it has product, multiply_pads and no {kind}")
        if out is not None and self.prepared.run(call, place):
            return out
        (payload,) = exactly(1, payloads)
        weights = self._weights.groups.get((call.group, call.layer))
        if weights is None:
            raise ProtocolError(f"there is no group {call.group} in layer {call.layer}")
        if isinstance(call, MultiplyPads):
            return self._multiply_pads(call, weights, self._backend.host_copy(payload), out)
        columns, inner = weights.wq.shape
        source = Place(payload, _input_dtype(call.digits), (call.rows, inner))
        x = self._backend.stage_in(*source)
        y = self._place(out, call.rows, weights)
        if out is not None and self.prepared.wants(call, place):
            target = Place(out, torch.int32, (call.rows, columns))

            def bind(x: torch.Tensor, y: torch.Tensor) -> Run:
                return prepared(weights, x, call.digits, y)

            key = ("field", call.group, call.layer, call.digits)
            self.prepared.keep(call, place, self._backend.prepare(key, source, target, bind))
        weights.product(x, call.digits, out=y)
        return self._backend.stage_out(y, out)

    def _multiply_pads(
        self, call: MultiplyPads, weights: FieldWeights, payload: memoryview, out: Payload | None
    ) -> Payload:
        bytes_tensor(payload, torch.uint8, (call.blocks, KEY_BYTES))  # its size, first
        place = self._place(out, call.blocks * BLOCK_ROWS, weights)
        for rows, pads in expanded(payload, weights.wq.shape[1]):
            multiply_pads(self._backend, weights, pads, place[rows])
        return self._backend.stage_out(place, out)

    def _place(self, out: Payload | None, rows: int, weights: FieldWeights) -> torch.Tensor:
        """Where a product (rows, out_features) is computed: in ``out`` if the device computes there.

        Raises ProtocolError for a product that no reply can carry, or for which ``out`` is not the room.
        """
        shape = (rows, len(weights.wq))
        check_frame(rows * len(weights.wq) * torch.int32.itemsize)
        place = self._backend.place(out, torch.int32, shape)
        return torch.empty(shape, dtype=torch.int32, device=self._weights.device) if place is None else place


def prepared(weights: FieldWeights, x: torch.Tensor, digits: Digits, y: torch.Tensor) -> Callable[[], object]:
    """``weights.product`` of memory that stays: of whatever x holds when it is called."""
    run = None
    if isinstance(weights.kernel, FewRowsKernel):
        run = weights.kernel.prepared(x, digits, weights.wq, weights.offsets, y)
    return run or partial(weights.product, x, digits, out=y)


def expanded(keys: memoryview, columns: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The pads of a dealer's keys, some blocks at a time: which rows they are, and ``expand_blocks`` of them."""
    for first in range(0, keys.nbytes // KEY_BYTES, DEALT_BLOCKS):
        pads = expand_blocks(keys[first * KEY_BYTES : (first + DEALT_BLOCKS) * KEY_BYTES], columns)
        yield slice(first * BLOCK_ROWS, first * BLOCK_ROWS + len(pads)), pads


def multiply_pads(backend: Backend, weights: FieldWeights, pads: torch.Tensor, out: torch.Tensor) -> None:
    """The products of pads in this process's memory, on a device."""
    weights.product(backend.stage_in(tensor_bytes(pads), torch.int32, tuple(pads.shape)), 4, out=out)


def expand_blocks(keys: memoryview, columns: int) -> torch.Tensor:
    """The pad rows of whole blocks, one key of 32 bytes each: uint32 bits in int32 (16 · blocks, columns)."""
    blocks = keys.nbytes // KEY_BYTES
    pads = torch.empty(blocks, BLOCK_ROWS, columns, dtype=torch.int32)
    for block, rows in enumerate(pads.view(torch.uint32).numpy()):
        expand(AesKeyStream(bytes(keys[block * KEY_BYTES : (block + 1) * KEY_BYTES])), rows)
    return pads.flatten(0, 1)


def _input_dtype(digits: Digits) -> torch.dtype:
    """What holds the bits of an input: uint32 mod p for four digits, int16 for two."""
    return torch.int32 if digits == 4 else torch.int16
