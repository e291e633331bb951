"""Gramine's ``/dev/attestation`` in memory, as ``QuoteFiles``: files that all of a process share.

After Gramine's documentation ("Attestation and secret provisioning"): 64 bytes are written to ``user_report_data``, and
``quote`` is then over them. Without remote attestation in the manifest, ``attestation_type`` says ``none`` and there is
no ``quote``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path("/fake/dev/attestation")
REPORT_DATA_BYTES = 64


class FakeGramine:
    """``make_quote`` gives the quote over what was written last. ``before`` as in ``FakeTsm``."""

    def __init__(self, make_quote: Callable[[bytes], bytes], attestation_type: str = "dcap") -> None:
        self.make_quote = make_quote
        self.attestation_type = attestation_type
        self.root = ROOT
        self.report_data = bytes(REPORT_DATA_BYTES)
        self.before: Callable[[str, Path], None] = lambda _operation, _path: None

    def make(self, directory: Path) -> None:
        raise _error(errno.EACCES, directory)

    def remove(self, directory: Path) -> None:
        raise _error(errno.EACCES, directory)

    def write(self, path: Path, data: bytes) -> None:
        self.before("write", path)
        if path != self.root / "user_report_data":
            raise _error(errno.ENOENT, path)
        if len(data) > REPORT_DATA_BYTES:
            raise _error(errno.EINVAL, path)
        self.report_data = data.ljust(REPORT_DATA_BYTES, b"\0")

    def read(self, path: Path, limit: int) -> bytes:
        self.before("read", path)
        if path == self.root / "attestation_type":
            return self.attestation_type.encode()[: limit + 1]
        if path == self.root / "quote" and self.attestation_type != "none":
            return self.make_quote(self.report_data)[: limit + 1]
        raise _error(errno.ENOENT, path)


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
