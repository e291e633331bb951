"""Every message that crosses the line, and nothing else.

A message travels as one small control frame; its tensors follow as raw frames. No call names a type, a dtype or a
function: the receiver derives dtype and shape of every payload from the handshake, from the model and from what it
asked for. The only free text is a reason for a human, and it is bounded.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tsqp.config.dtype import ComputeDtype, NumericPath, WireDtype
from tsqp.config.groups import GroupName
from tsqp.config.shard import MOST_TEXT, PATTERN

PROTOCOL_VERSION = 4

CallId = Annotated[int, Meta(ge=0, lt=2**62)]
Count = Annotated[int, Meta(ge=1, lt=2**31)]
Nanoseconds = Annotated[int, Meta(ge=0, lt=2**62)]
Stage = tuple[Nanoseconds, Nanoseconds]  # its beginning and its end
Index = Annotated[int, Meta(ge=0, lt=2**31)]
Fingerprint = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
# Shown to the user: one device, or several CUDA devices, which share each group.
Device = Annotated[str, Meta(pattern=r"^(cpu|cuda:[0-9]{1,3}(,cuda:[0-9]{1,3}){0,31})$", max_length=288)]
Reason = Annotated[str, Meta(max_length=500)]
ShardText = Annotated[str, Meta(pattern=PATTERN, max_length=MOST_TEXT)]  # as tsqp.config.shard writes it


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base: encoded as an array, unknown fields refused."""


class Hello(Message, frozen=True, tag="hello"):
    """Trusted side, first on a connection. ``wire_dtype`` is the format of every float payload after it.

    ``path`` is what the worker is to compute linear layers in; calls of another path fail.
    """

    version: Index
    fingerprint: Fingerprint
    wire_dtype: WireDtype
    path: NumericPath = "float"


class GroupShape(Message, frozen=True):
    """One linear group as the worker holds it: of a shard, ``out_features`` are those of its slice.

    ``digest``, for the field path: SHA-256 over its 8-bit weights, all its layers in order, row-major. Otherwise None.
    """

    name: GroupName
    in_features: Count
    out_features: Count
    digest: Fingerprint | None = None


class Welcome(Message, frozen=True, tag="welcome"):
    """The worker accepts. ``dtype`` is what it computes linear layers in.

    ``shard`` is what it holds, None for all of the model. ``groups`` are those that it has in some layer.
    """

    version: Index
    fingerprint: Fingerprint
    groups: Annotated[tuple[GroupShape, ...], Meta(max_length=8)]
    device: Device
    dtype: ComputeDtype
    shard: ShardText | None = None


class Refused(Message, frozen=True, tag="refused"):
    """The worker does not accept the Hello. ``fingerprint`` is its own."""

    version: Index
    fingerprint: Fingerprint
    reason: Reason


class Linear(Message, frozen=True, tag="linear"):
    """y = x Wᵀ + b. One payload x: (rows, in_features). Reply y: (rows, out_features).

    ``layer`` is None for the LM head only; ``part`` picks one matrix of the group, None means all of them.
    """

    id: CallId
    group: GroupName
    layer: Index | None
    part: Index | None
    rows: Count


class Product(Message, frozen=True, tag="product"):
    """Field path: y = x Wqᵀ mod p for all parts of a group. One payload x: (rows, in_features).

    ``digits`` 4: x is uint32 mod p. 2: x is int16 of at most 32,639. Reply y: uint32 mod p (rows, out_features).
    """

    id: CallId
    group: GroupName
    layer: Index | None
    rows: Count
    digits: Literal[2, 4]


class MultiplyPads(Message, frozen=True, tag="multiply_pads"):
    """Field path, to a dealer: r Wqᵀ mod p for blocks of pads. One payload: a key of 32 bytes for each block.

    Each key is expanded to r (16, in_features), see ``tsqp.arith.expand``. Reply: uint32 (16 · blocks, out_features).
    """

    id: CallId
    group: GroupName
    layer: Index | None
    blocks: Annotated[int, Meta(ge=1, le=4096)]


class Embed(Message, frozen=True, tag="embed"):
    """Embedding look-up. One payload of int32 token ids: (rows,). Reply: (rows, hidden_size)."""

    id: CallId
    rows: Count


class AttentionScores(Message, frozen=True, tag="attention_scores"):
    """Q·Kᵀ. Payloads q: (num_heads, rows, head_dim), k: (num_kv_heads, keys, head_dim).

    Reply: (num_heads, rows, keys).
    """

    id: CallId
    rows: Count
    keys: Count


class AttentionValues(Message, frozen=True, tag="attention_values"):
    """probabilities·V. Payloads p: (num_heads, rows, keys), v: (num_kv_heads, keys, head_dim).

    Reply: (num_heads, rows, head_dim).
    """

    id: CallId
    rows: Count
    keys: Count


class Place(Message, frozen=True):
    """Consecutive new tokens of one sequence: ``sequence`` is the client's number for it, ``position`` the first's.

    ``begun``: the tokens of its prompt, on which rotary embeddings may depend; 0 if all of it is here.
    """

    sequence: Index
    position: Index
    rows: Count
    begun: Index = 0


class Begin(Message, frozen=True, tag="begin"):
    """Begin a forward pass that stays on the worker. One payload of int32 token ids: (sum of rows,). No product.

    The worker looks up the embedding and keeps it, with a KV cache for each sequence of this connection, until the
    client tells it to ``forget`` the sequence or goes. The rows cross the layers in chunks of ``max_rows``.
    """

    id: CallId
    places: Annotated[tuple[Place, ...], Meta(min_length=1, max_length=64)]
    max_rows: Count
    forget: Annotated[tuple[Index, ...], Meta(max_length=256)] = ()


class Layer(Message, frozen=True, tag="layer"):
    """Put one chunk of the pass that call ``begin`` began through one layer. No payload, no product."""

    id: CallId
    begin: CallId
    layer: Index
    chunk: Index


class Finish(Message, frozen=True, tag="finish"):
    """Final norm and LM head of a pass, which ends. No payload.

    Reply: logits (sequences, vocab_size) of each sequence's last row; (sum of rows, vocab_size) for ``every_row``.
    """

    id: CallId
    begin: CallId
    every_row: bool


class Done(Message, frozen=True, tag="done"):
    """The product asked for by call ``id`` follows as one payload.

    ``busy_ns``: how long the worker says it computed. A figure to show: nothing may depend on it.
    """

    id: CallId
    busy_ns: Nanoseconds = 0


class StagedDone(Done, frozen=True, tag="staged_done"):
    """The same, of a device that copies in, computes and copies out in queues of their own.

    ``stages``: when each of the three began and ended, from the beginning of the first. Figures to show, like
    ``busy_ns``.
    """

    stages: tuple[Stage, Stage, Stage] = ((0, 0), (0, 0), (0, 0))


class Failed(Message, frozen=True, tag="failed"):
    """The worker could not do call ``id``."""

    id: CallId
    reason: Reason


Call = Linear | Product | MultiplyPads | Embed | AttentionScores | AttentionValues | Begin | Layer | Finish
ToWorker = Hello | Call
Handshake = Welcome | Refused
Reply = Done | StagedDone | Failed
