"""Calls of one connection over several devices: each computes its columns of a product, all at the same time.

See ``docs/gpu.md`` §7. What is no product by weights is computed by the first device alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES
from tsqp.config.dtype import WireDtype
from tsqp.config.groups import GroupKey, LinearGroup, cut, linear_groups
from tsqp.errors import ProtocolError
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.many import ManyDevices
from tsqp.untrusted.paths.field import FieldOperators, FieldWorkerWeights, expanded, multiply_pads
from tsqp.untrusted.paths.many_weights import ManyWeights
from tsqp.untrusted.paths.plain import Operators, check_frame, exactly
from tsqp.untrusted.paths.prepared import Prepared
from tsqp.untrusted.paths.slices import Share, share, slices
from tsqp.wire.device_memory import Payload, on_the_host
from tsqp.wire.messages import Begin, Call, Finish, Layer, Linear, MultiplyPads, Product
from tsqp.wire.payload import Int8Format, PlainFormat, WireFormat, bytes_tensor, check_size, tensor_bytes, wire_format


@dataclass(frozen=True)
class Int8Inwards(Int8Format):
    """Rows come in as int8 and go out as floats: the scale of a row is that of all its columns."""

    outwards: torch.dtype

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.outwards)


class ManyOperators:
    """See Operators and FieldOperators. ``devices`` are those which the weights are on."""

    keeps_state = False  # nothing outlives a call

    def __init__(self, weights: ManyWeights, wire: WireDtype, devices: ManyDevices) -> None:
        self._weights = weights
        self._devices = devices
        self._wire = wire_format(wire)
        self._gathered: torch.dtype | None = None  # of what is converted for the wire on the host
        self.prepared = Prepared()  # stays empty: each device prepares its own
        first = weights.parts[0]
        of_parts = self._wire
        if self._wire.dtype is None and isinstance(first, ModelWeights):
            self._gathered, of_parts = first.dtype, Int8Inwards(first.dtype)
        self._parts = [
            _operators(weights.parts[device], of_parts, backend) for device, backend in enumerate(devices.backends)
        ]
        self._alone = _operators(first, self._wire, devices.backends[0])

    def __call__(
        self, call: Call, payloads: Sequence[Payload], out: Payload | None = None, place: bytes = b""
    ) -> Payload | None:
        """See Operators. Raises ProtocolError, also for calls of partition ``layer``, and for memory of a device."""
        if isinstance(call, Begin | Layer | Finish):
            raise ProtocolError(
                f"this worker computes on {self._devices.name}: partition layer is of a worker on one device"
            )
        here = [on_the_host(payload, self._devices.name) for payload in payloads]
        room = None if out is None else on_the_host(out, self._devices.name)
        if isinstance(call, Linear | Product | MultiplyPads) and self._is_of_the_path(call):
            return self._product(call, here, room, place)
        with self._devices.using(0):
            return self._alone(call, here, room, place)  # which says what is wrong with a call of another path

    def _is_of_the_path(self, call: Linear | Product | MultiplyPads) -> bool:
        return isinstance(call, Linear) == (self._weights.compute != "field")

    def _product(
        self,
        call: Linear | Product | MultiplyPads,
        payloads: Sequence[memoryview],
        out: memoryview | None,
        place: bytes,
    ) -> memoryview:
        group = self._group((call.group, call.layer))
        part = call.part if isinstance(call, Linear) else None
        if part is not None and part >= len(group.parts):
            raise ProtocolError(f"group {call.group} has no part {part}")
        first, end = group.part_rows(part)
        rows = call.blocks * BLOCK_ROWS if isinstance(call, MultiplyPads) else call.rows
        shape = (rows, end - first)
        wire = self._wire if isinstance(call, Linear) else PlainFormat(torch.int32)
        size = wire.size(shape)
        check_frame(size)
        if out is None:
            out = tensor_bytes(torch.empty(size, dtype=torch.uint8))
        check_size(out, torch.uint8, (size,))
        owned = [share(group, part, own) for own in slices(group.out_features, len(self._parts))]
        if isinstance(call, MultiplyPads):
            self._deal(call, payloads, out, owned, end - first)
        elif self._gathered is None:
            self._each(call, payloads, out, place, owned, end - first)
        else:
            floats = torch.empty(shape, dtype=self._gathered)
            self._each(call, payloads, tensor_bytes(floats), b"", owned, end - first)
            room = out
            self._devices.after(lambda: wire.write(floats, room))
        return out

    def _each(
        self,
        call: Linear | Product,
        payloads: Sequence[memoryview],
        out: memoryview,
        place: bytes,
        owned: Sequence[Share],
        columns: int,
    ) -> None:
        """Queue the work of each device that has some of the columns; none is waited for."""
        for device, own in enumerate(owned):
            if own.width:
                with self._devices.using(device) as backend, backend.columns(own.first, columns):
                    self._parts[device](call, payloads, out, place)

    def _deal(
        self,
        call: MultiplyPads,
        payloads: Sequence[memoryview],
        out: memoryview,
        owned: Sequence[Share],
        columns: int,
    ) -> None:
        """The keys are expanded once: each block goes to all devices before the next one is expanded."""
        (payload,) = exactly(1, payloads)
        bytes_tensor(payload, torch.uint8, (call.blocks, KEY_BYTES))  # its size, first
        parts = [own for own in self._weights.parts if isinstance(own, FieldWorkerWeights)]
        weights = [own.groups[call.group, call.layer] for own in parts]
        products = []
        for device, own in enumerate(owned):
            with self._devices.using(device) as backend:
                shape = (call.blocks * BLOCK_ROWS, own.width)
                products.append(torch.empty(shape, dtype=torch.int32, device=backend.device))
        for rows, pads in expanded(payload, weights[0].wq.shape[1]):
            for device, product in enumerate(products):
                with self._devices.using(device) as backend:
                    multiply_pads(backend, weights[device], pads, product[rows])
        for device, product in enumerate(products):
            with self._devices.using(device) as backend, backend.columns(owned[device].first, columns):
                backend.stage_out(product, out)

    def _group(self, key: GroupKey) -> LinearGroup:
        name, layer = key
        if key not in self._weights.parts[0].groups:
            raise ProtocolError(f"there is no group {name} in layer {layer}")
        group = linear_groups(self._weights.config)[name]
        return cut(group, *self._weights.shard.columns(group.out_features))


def _operators(
    weights: ModelWeights | FieldWorkerWeights, wire: WireFormat, backend: Backend
) -> Operators | FieldOperators:
    if isinstance(weights, FieldWorkerWeights):
        return FieldOperators(weights, backend)
    return Operators(weights, wire, backend)
