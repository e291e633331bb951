"""The operations on this machine's own files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.commands import descriptors_of
from tests.tee.fake_providers import quote_maker
from tsqp.tee.providers import ConfigfsTsm, Gramine, report_data_of
from tsqp.tee.quote_files import SystemFiles

FILES = SystemFiles()
OPEN = Path("/proc/self/fd")


@pytest.mark.parametrize(
    ("size", "limit", "expected"), [(0, 4, 0), (4, 4, 4), (5, 4, 5), (9, 4, 5), (100_000, 99_999, 100_000)]
)
def test_reading_ends_one_byte_beyond_the_limit(tmp_path: Path, size: int, limit: int, expected: int) -> None:
    path = tmp_path / "blob"
    path.write_bytes(bytes(size))
    assert len(FILES.read(path, limit)) == expected


def test_a_blob_that_comes_in_parts_is_put_together(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"in several parts")
    original = os.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", lambda descriptor, size: original(descriptor, min(size, 3)))
        assert FILES.read(path, 100) == b"in several parts"
        assert FILES.read(path, 3) == b"in s"


def test_what_would_block_is_an_error(tmp_path: Path) -> None:
    def read(_descriptor: int, _size: int) -> bytes:
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))

    path = tmp_path / "blob"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", read)
        with pytest.raises(BlockingIOError):
            FILES.read(path, 4)


def test_writing_neither_makes_nor_empties_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FILES.write(tmp_path / "inblob", b"x")
    path = tmp_path / "user_report_data"
    path.write_bytes(b"abcd")
    FILES.write(path, b"xy")
    assert path.read_bytes() == b"xycd"


def test_a_write_that_was_taken_in_part_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "inblob"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda _descriptor, data: len(data) - 1)
        with pytest.raises(OSError, match="a part"):
            FILES.write(path, b"xy")


@pytest.mark.skipif(not OPEN.is_dir(), reason="/proc is Linux's")
def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"four")
    FILES.read(path, 4)
    FILES.write(path, b"more")
    assert descriptors_of(path) == []


class Answering(SystemFiles):
    """Real files that answer: after each write there is a forged quote over what was written, and a new generation."""

    def make(self, directory: Path) -> None:
        super().make(directory)
        for name, content in (("provider", b"tdx_guest\n"), ("generation", b"0\n"), ("inblob", b""), ("outblob", b"")):
            (directory / name).write_bytes(content)

    def write(self, path: Path, data: bytes) -> None:
        super().write(path, data)
        generation = path.parent / "generation"
        if generation.exists():
            generation.write_text(f"{int(generation.read_text()) + 1}\n")
            (path.parent / "outblob").write_bytes(quote_maker("tdx")(path.read_bytes()))
        else:
            (path.parent / "quote").write_bytes(quote_maker("sgx")(path.read_bytes()))

    def remove(self, directory: Path) -> None:
        for attribute in directory.iterdir():
            attribute.unlink()
        super().remove(directory)


def test_linux_answers_through_files(tmp_path: Path) -> None:
    asked = bytes(range(64))
    assert report_data_of(ConfigfsTsm(tmp_path, Answering()).quote(asked)) == asked
    assert list(tmp_path.iterdir()) == []


def test_gramine_answers_through_files(tmp_path: Path) -> None:
    (tmp_path / "attestation_type").write_text("dcap")
    (tmp_path / "user_report_data").touch()
    for asked in (bytes(range(64)), bytes(64)):
        assert report_data_of(Gramine(tmp_path, Answering()).quote(asked)) == asked


def test_directories_come_and_go(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    FILES.make(entry)
    with pytest.raises(FileExistsError):
        FILES.make(entry)
    FILES.remove(entry)
    assert not entry.exists()
    with pytest.raises(FileNotFoundError):
        FILES.make(entry / "below")
