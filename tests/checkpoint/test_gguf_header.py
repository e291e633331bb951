from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.gguf_header import GgufHeader
from tsqp.errors import CheckpointError, CorruptCheckpoint, UnsupportedModel

from .gguf_bytes import ARRAY, STRING, array, gguf_bytes, pair, tensor, text
from .makers import byte_level_fields, make_model, write_gguf

F32 = 0
WHOLE = [
    pair("general.architecture", STRING, text("llama")),
    pair("tokens", ARRAY, array(STRING, 3, text("a") + text("") + text("ü"))),
    pair("types", ARRAY, array(5, 2, struct.pack("<ii", 1, -3))),
    pair("yes", 7, b"\x01"),
]
NUMBERS = {
    gguf.GGUFValueType.UINT8: st.integers(0, 2**8 - 1),
    gguf.GGUFValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    gguf.GGUFValueType.UINT16: st.integers(0, 2**16 - 1),
    gguf.GGUFValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    gguf.GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    gguf.GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    gguf.GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    gguf.GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    gguf.GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    gguf.GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    gguf.GGUFValueType.BOOL: st.booleans(),
    gguf.GGUFValueType.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "m.gguf"


def opened(path: Path, content: bytes) -> GgufHeader:
    path.unlink(missing_ok=True)  # another file: the last one may still be mapped
    path.write_bytes(content)
    return GgufHeader(path)


@given(st.sampled_from(list(NUMBERS)).flatmap(lambda k: st.tuples(st.just(k), NUMBERS[k], st.lists(NUMBERS[k]))))
def test_every_kind_of_value_is_read_as_the_package_writes_it(path: Path, case: tuple[Any, Any, list[Any]]) -> None:
    kind, value, values = case
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value("one", value, kind)
    if values:  # the package writes no empty arrays
        writer.add_key_value("many", values, gguf.GGUFValueType.ARRAY, sub_type=kind)
    writer.add_uint32("last", 7)
    path.unlink(missing_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = GgufHeader(path)
    assert header.value("one") == value
    assert isinstance(header.value("one"), type(value))
    assert not values or header.value("many") == values
    assert header.value("last") == 7


def test_where_tensors_lie(path: Path) -> None:
    data = np.arange(12, dtype=np.float32).tobytes() + bytes(16) + np.ones(4, np.float32).tobytes()
    content = gguf_bytes(WHOLE, [tensor("w", (4, 3), F32), tensor("v", (4,), F32, 64)], data)
    file = GgufFile(opened(path, content).path)
    assert file.shapes() == {"w": (3, 4), "v": (4,)}
    assert file.tensor("w").tolist() == np.arange(12).reshape(3, 4).tolist()
    assert file.tensor("v").tolist() == [1, 1, 1, 1]
    assert file.rows("w", 1, 3).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_another_alignment(path: Path) -> None:
    pairs = [*WHOLE, pair("general.alignment", 4, struct.pack("<I", 256))]
    content = gguf_bytes(pairs, [tensor("w", (1,), F32)], struct.pack("<f", 5), alignment=256)
    assert GgufFile(opened(path, content).path).tensor("w").tolist() == [5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gguf_bytes(counts=(0, 1 << 60)), "ends too early"),
        (gguf_bytes(counts=(1 << 60, 0)), "ends too early"),
        (gguf_bytes([pair("a", STRING, struct.pack("<Q", 1 << 63))]), "ends too early"),
        (gguf_bytes([pair("a", ARRAY, array(STRING, 1 << 60, b""))]), "ends too early"),
        (gguf_bytes([pair("a", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 1 << 63)))]), "ends too early"),
        (gguf_bytes([pair("a", ARRAY, array(12, 1 << 61, b""))]), "ends too early"),
        (gguf_bytes([pair("a", ARRAY, array(ARRAY, 1, array(4, 0, b"")))]), "array of the unknown type 9"),
        (gguf_bytes([pair("a", 13, bytes(8))]), "unknown type 13"),
        (gguf_bytes([WHOLE[0], WHOLE[0]]), "the key general.architecture twice"),
        (gguf_bytes([pair(b"\xff", 7, b"\x01")]), "a name is not UTF-8"),
        (gguf_bytes([pair("a" * 65_536, 7, b"\x01")]), "a name has 65536 bytes"),
        (gguf_bytes([pair(str(i), 7, b"\x01") for i in range(65_537)]), "has 65537 keys, more than 65536"),
        (gguf_bytes([pair("a\nb", 7, b"\x01")]), "a name is not printable"),
        (gguf_bytes(WHOLE, [tensor("w", (1,), F32), tensor("w", (1,), F32)], bytes(64)), "the tensor w twice"),
        (gguf_bytes(WHOLE, [tensor("w", (1,) * 5, F32)], bytes(64)), "w has 5 dimensions"),
        (gguf_bytes(WHOLE, [tensor("w", (), F32)], bytes(64)), "w has 0 dimensions"),
        (gguf_bytes(WHOLE, [tensor("w", (4, 0), F32)], bytes(64)), "w is empty"),
        (gguf_bytes(WHOLE, [tensor("w", (4,), F32, 4)], bytes(64)), "w does not begin at a multiple of 32"),
        (gguf_bytes(WHOLE, [tensor("w", (16,), F32, 32)], bytes(64)), "ends before w does"),
        (gguf_bytes(WHOLE, [tensor("w", (2**63, 2**63), F32)], bytes(64)), "ends before w does"),
        (gguf_bytes(WHOLE, [tensor("w", (48,), 12)], bytes(512)), "w has rows of 48 numbers: no whole Q4_K blocks"),
        (gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
        (gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
        (b"GGML" + gguf_bytes(WHOLE)[4:], "does not begin with GGUF"),
    ],
)
def test_broken_files_are_told_in_a_line(path: Path, content: bytes, said: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=said) as raised:
        GgufFile(opened(path, content).path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("version", [0, 1, 4])
def test_other_versions_are_refused(path: Path, version: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"version {version} of GGUF"):
        opened(path, gguf_bytes(WHOLE, version=version))


def test_texts_and_arrays_stay_in_the_file_until_they_are_asked_for(path: Path) -> None:
    """What a header keeps does not grow with what is in it: a worker asks for none of the tokens."""
    long, many = text("x" * (1 << 22)), array(STRING, 100_000, text("token") * 100_000)
    content = gguf_bytes([pair("long", STRING, long), pair("many", ARRAY, many), pair("last", 4, bytes(4))])
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    tracemalloc.start()
    header = GgufHeader(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 18
    assert header.value("long") == "x" * (1 << 22)
    assert header.value("many") == ["token"] * 100_000


def test_text_that_is_not_utf8_is_told_with_its_key(path: Path) -> None:
    header = opened(path, gguf_bytes([pair("a", STRING, text(b"\xff")), pair("b", ARRAY, array(8, 1, text(b"\xff")))]))
    for key in ("a", "b"):
        with pytest.raises(CorruptCheckpoint, match=f"{key} is not UTF-8"):
            header.value(key)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file as the package writes it, without the tensors' bytes."""
    path = tmp_path_factory.mktemp("real") / "m.gguf"
    write_gguf(path, make_model("llama", num_hidden_layers=1), tokenizer=byte_level_fields())
    return path.read_bytes()


@given(st.data())
def test_damaged_anywhere_it_opens_or_is_refused(path: Path, real: bytes, data: st.DataObject) -> None:
    """Whatever bytes a header has: nothing but our own errors, and nothing large is made for it."""
    damaged = bytearray(real)
    header = real.index(b"blk.0.attn_norm") + 400
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header))
        wrong = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(bytes(8))))
        damaged[at : at + len(wrong)] = wrong
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    said = ""
    try:
        file = GgufFile(path)
        for key in list(file._header.values):
            file._header.value(key)
    except CheckpointError as error:
        said = str(error)
    assert said.isprintable()
