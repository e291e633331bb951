"""What the receiver of a captured connection can read out of it: rows of numbers, by linear group and layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream, expand
from tsqp.arith.modulus import P
from tsqp.audit.capture import Capture
from tsqp.config.dtype import ITEM_BYTES, WireDtype
from tsqp.config.groups import GroupKey, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.trusted.tap import Seen
from tsqp.wire.messages import Hello, Linear, MultiplyPads, Product
from tsqp.wire.payload import wire_format

Words = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


@dataclass(frozen=True)
class WordRows:
    """Payloads as unsigned words below ``modulus``: one array (rows, n) for each linear group, rows in order sent."""

    groups: list[Words]
    modulus: int


class View:
    """What one receiver, the worker or a dealer, has seen."""

    def __init__(self, capture: Capture, config: ModelConfig) -> None:
        self.bytes_seen = capture.bytes_seen
        self.calls = sum(isinstance(seen.message, Linear | Product | MultiplyPads) for seen in capture.messages)
        self.keys = sum(seen.message.blocks for seen in capture.messages if isinstance(seen.message, MultiplyPads))
        self._seen = capture.messages
        self._groups = linear_groups(config)
        hello = next(seen.message for seen in capture.messages if isinstance(seen.message, Hello))
        self._wire: WireDtype = hello.wire_dtype

    def rows(self, key: GroupKey) -> torch.Tensor:
        """The inputs of one linear layer, float32 (rows, in_features), in the order sent.

        Numbers of F_p are centred. Keys are expanded, as a dealer does, to the pads that they are.
        """
        found = [self._read(seen, payload) for seen, payload in self._calls() if _key(seen.message) == key]
        return torch.cat(found) if found else torch.empty(0, self._groups[key[0]].in_features)

    def words(self) -> WordRows:
        """Every payload that was kept."""
        rows: dict[tuple[GroupKey, int], list[Words]] = defaultdict(list)
        modulus = 0
        for seen, payload in self._calls():
            words, modulus = self._words(seen, payload)
            rows[_key(seen.message), words.shape[1]].append(words)
        return WordRows([np.concatenate(parts) for parts in rows.values()], modulus)

    def first_words(self, key: GroupKey, most: int) -> WordRows:
        """Rows of one linear layer as they were sent, in order: as many as have together at most so many words."""
        found: list[Words] = []
        modulus = 0
        for seen, payload in self._calls():
            if _key(seen.message) == key:
                words, modulus = self._words(seen, payload)
                words = words[: most // words.shape[1]]
                if not len(words):
                    break
                found.append(words)
                most -= words.size
        return WordRows([np.concatenate(found)] if found else [], modulus)

    def _calls(self) -> Iterator[tuple[Seen, bytes]]:
        for seen in self._seen:
            if isinstance(seen.message, Linear | Product | MultiplyPads) and seen.payloads is not None:
                yield seen, seen.payloads[0]

    def _read(self, seen: Seen, payload: bytes) -> torch.Tensor:
        match seen.message:
            case Linear(group=group, rows=rows):
                shape = (rows, self._groups[group].in_features)
                return wire_format(self._wire).read(memoryview(bytearray(payload)), shape, torch.float32)
            case Product(digits=4, rows=rows):
                return centred(np.frombuffer(payload, "<u4").reshape(rows, -1))
            case Product(rows=rows):
                return torch.from_numpy(np.frombuffer(payload, "<i2").reshape(rows, -1).astype(np.float32))
            case MultiplyPads(group=group):
                return _pads(payload, self._groups[group].in_features)
        raise TypeError(f"{type(seen.message).__name__} is no call of a linear group")

    def _words(self, seen: Seen, payload: bytes) -> tuple[Words, int]:
        match seen.message:
            case Linear(rows=rows):
                bits = 8 if self._wire == "int8" else 8 * ITEM_BYTES[self._wire]  # int8: digits, and scales as bytes
                return np.frombuffer(payload, f"<u{bits // 8}").reshape(rows, -1), 1 << bits
            case Product(digits=4, rows=rows):
                return np.frombuffer(payload, "<u4").reshape(rows, -1), P
            case Product(rows=rows):
                return np.frombuffer(payload, "<u2").reshape(rows, -1), 1 << 16
            case _:
                return np.frombuffer(payload, "<u1").reshape(-1, KEY_BYTES), 1 << 8


def centred(words: Words) -> torch.Tensor:
    """Numbers of F_p as the signed ones nearest to 0, float32."""
    values = words.astype(np.int64)
    return torch.from_numpy(np.where(values > P // 2, values - P, values).astype(np.float32))


def _pads(keys: bytes, in_features: int) -> torch.Tensor:
    blocks = []
    for start in range(0, len(keys), KEY_BYTES):
        block = np.empty((BLOCK_ROWS, in_features), np.uint32)
        expand(AesKeyStream(keys[start : start + KEY_BYTES]), block)
        blocks.append(centred(block))
    return torch.cat(blocks)


def _key(message: object) -> GroupKey:
    if isinstance(message, Linear | Product | MultiplyPads):
        return message.group, message.layer
    raise TypeError(f"{type(message).__name__} is no call of a linear group")
