"""The products of the float and int8 paths: from a call and its payloads to the bytes of its product.

A product depends on the call, the payloads and the weights alone, except at the ``layer`` partition: there it also
depends on the connection's ``LayerState``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

from tsqp.errors import ProtocolError
from tsqp.model.attention import score_product, value_product
from tsqp.model.linear import prepared
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.layers import LayerState
from tsqp.untrusted.paths.prepared import Prepared
from tsqp.wire.channel import MAX_FRAME_BYTES
from tsqp.wire.messages import (
    AttentionScores,
    AttentionValues,
    Begin,
    Call,
    Embed,
    Finish,
    Layer,
    Linear,
    MultiplyPads,
    Product,
)
from tsqp.wire.payload import WireFormat, bytes_tensor, lies_in, tensor_bytes


class Operators:
    """Computes the calls of one connection; float payloads are in the ``wire`` format both ways."""

    def __init__(self, weights: ModelWeights, wire: WireFormat) -> None:
        self._weights = weights
        self._wire = wire
        self.prepared = Prepared()

    @cached_property
    def _layers(self) -> LayerState:
        """What this connection keeps here at the ``layer`` partition; nothing at the others."""
        return LayerState(self._weights)

    @property
    def keeps_state(self) -> bool:
        """Whether this connection has anything here that outlives a call."""
        return "_layers" in self.__dict__

    def __call__(
        self, call: Call, payloads: Sequence[memoryview], out: memoryview | None = None, place: bytes = b""
    ) -> memoryview | None:
        """The product of one call, in ``out`` where that is given; None for a call without a product.

        ``place`` is that of ``Arrival``. Raises ProtocolError for a call that does not fit the model, its payloads or
        the room for its product.
        """
        if out is not None and self.prepared.run(call, place):
            return out
        match call:
            case Linear():
                product = self._linear(call, payloads, out, place)
            case Embed():
                product = self._embed(call, payloads)
            case AttentionScores():
                product = self._scores(call, payloads, out)
            case AttentionValues():
                product = self._mix(call, payloads, out)
            case Begin():
                (payload,) = exactly(1, payloads)
                rows = sum(place.rows for place in call.places)
                self._layers.begin(call, self._tokens(payload, rows))
                return None
            case Layer():
                self._layers.layer(call)
                return None
            case Finish():
                self._place(None, (self._layers.rows_of(call), self._weights.config.vocab_size))  # its size, first
                product = self._layers.finish(call)
            case Product() | MultiplyPads():
                raise ProtocolError("products mod p are of the field path, and this connection asked for another")
        return self._payload(product, out)

    def _linear(
        self, call: Linear, payloads: Sequence[memoryview], out: memoryview | None, place: bytes
    ) -> torch.Tensor:
        (payload,) = exactly(1, payloads)
        weights = self._weights.groups.get((call.group, call.layer))
        if weights is None:
            raise ProtocolError(f"there is no group {call.group} in layer {call.layer}")
        if call.part is not None and call.part >= len(weights.group.parts):
            raise ProtocolError(f"group {call.group} has no part {call.part}")
        first, end = weights.group.part_rows(call.part)
        x = self._floats(payload, (call.rows, weights.group.in_features))
        y = self._place(out, (call.rows, end - first))
        if out is not None and y is not None and lies_in(x, payload) and lies_in(y, out):
            self.prepared.keep(call, place, prepared(weights, x, call.part, y))
        return weights.product(x, call.part, out=y)

    def _embed(self, call: Embed, payloads: Sequence[memoryview]) -> torch.Tensor:
        (payload,) = exactly(1, payloads)
        return F.embedding(self._tokens(payload, call.rows).to(self._weights.device), self._weights.embedding)

    def _tokens(self, payload: memoryview, rows: int) -> torch.Tensor:
        """int32 token ids (rows,), all of the vocabulary."""
        tokens = bytes_tensor(payload, torch.int32, (rows,))
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._weights.config.vocab_size:
            raise ProtocolError("a token id is outside of the vocabulary")
        return tokens

    def _scores(self, call: AttentionScores, payloads: Sequence[memoryview], out: memoryview | None) -> torch.Tensor:
        q, k = exactly(2, payloads)
        config = self._weights.config
        return score_product(
            self._floats(q, (config.num_heads, call.rows, config.head_dim)),
            self._floats(k, (config.num_kv_heads, call.keys, config.head_dim)),
            out=self._place(out, (config.num_heads, call.rows, call.keys)),
        )

    def _mix(self, call: AttentionValues, payloads: Sequence[memoryview], out: memoryview | None) -> torch.Tensor:
        p, v = exactly(2, payloads)
        config = self._weights.config
        return value_product(
            self._floats(p, (config.num_heads, call.rows, call.keys)),
            self._floats(v, (config.num_kv_heads, call.keys, config.head_dim)),
            out=self._place(out, (config.num_heads, call.rows, config.head_dim)),
        )

    def _floats(self, payload: memoryview, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = self._weights.dtype
        return self._wire.read(payload, shape, dtype).to(self._weights.device)

    def _payload(self, product: torch.Tensor, out: memoryview | None) -> memoryview:
        """A product as its payload: in ``out`` where that is given, without a copy where it was computed there."""
        shape = tuple(product.shape)
        if out is None:
            if product.dtype == self._wire.dtype:
                return tensor_bytes(product.to("cpu").contiguous())
            out = tensor_bytes(torch.empty(self._wire.size(shape), dtype=torch.uint8))
        elif self._wire.dtype is not None:
            place = bytes_tensor(out, self._wire.dtype, shape)
            if place.data_ptr() == product.data_ptr():
                return out
        self._wire.write(product, out)
        return out

    def _place(self, out: memoryview | None, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Where a product can be computed in place; None where it must be computed elsewhere and copied.

        Raises ProtocolError for a product that no reply can carry, before it is computed.
        """
        size = self._wire.size(shape)
        if size > MAX_FRAME_BYTES:
            raise ProtocolError(f"a product of {size} bytes; the limit is {MAX_FRAME_BYTES}: use smaller chunks")
        if out is None or self._weights.device.type != "cpu" or self._weights.dtype != self._wire.dtype:
            return None
        return bytes_tensor(out, self._weights.dtype, shape)


def exactly(count: int, payloads: Sequence[memoryview]) -> Sequence[memoryview]:
    """The payloads, of which there are ``count``. Raises ProtocolError."""
    if len(payloads) != count:
        raise ProtocolError(f"{len(payloads)} payloads where {count} were expected")
    return payloads
