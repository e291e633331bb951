"""The operations on files that a provider of quotes needs. A seam for tests: no ordinary file answers a write."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol


class QuoteFiles(Protocol):
    """Each raises OSError as the system does."""

    def make(self, directory: Path) -> None:
        """Make a directory that does not exist yet."""

    def remove(self, directory: Path) -> None:
        """Remove a directory. In configfs its attributes go with it."""

    def write(self, path: Path, data: bytes) -> None:
        """Write to a file that exists, in one go: configfs takes what was written when the file is closed."""

    def read(self, path: Path, limit: int) -> bytes:
        """All that a file gives, or its first ``limit + 1`` bytes where it gives more than ``limit``."""


class SystemFiles:
    """Those of this machine."""

    def make(self, directory: Path) -> None:
        directory.mkdir()

    def remove(self, directory: Path) -> None:
        directory.rmdir()

    def write(self, path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.EIO, "took a part of what was written", str(path))
        finally:
            os.close(descriptor)

    def read(self, path: Path, limit: int) -> bytes:
        # Not by Path.read_bytes: on EWOULDBLOCK a file object of Python answers None, os.read raises.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = b""
            while len(found) <= limit and (more := os.read(descriptor, limit + 1 - len(found))):
                found += more
            return found
        finally:
            os.close(descriptor)
