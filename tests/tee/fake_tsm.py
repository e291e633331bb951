"""Linux's configfs-tsm in memory, as ``QuoteFiles``: what a directory of reports does when it is written to and read.

After drivers/virt/coco/tsm.c and configfs-tsm-report of Linux's ABI documentation. Making a directory makes its
attributes. Each write to an option counts in ``generation``, and one that is refused does not, although who writes a
blob is not told: it is handed over when its file is closed. Reading ``outblob`` or ``auxblob`` makes the quote.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/fake/tsm/report")
INBLOB_MAX = 64


@dataclass
class Entry:
    """One report. ``made_at``: the generation of which ``out`` and ``aux`` are."""

    inblob: bytes = b""
    generation: int = 0
    made_at: int | None = None
    out: bytes = b""
    aux: bytes = b""


class FakeTsm:
    """``make_quote`` gives ``outblob`` for what was written to ``inblob``; ``certificates`` is ``auxblob``.

    ``before`` is called with the operation and its path before each, as ``before("read", path)``: there a test raises
    what the system would, or is another process that writes in between.
    """

    def __init__(self, provider: str, make_quote: Callable[[bytes], bytes], certificates: bytes = b"") -> None:
        self.provider = provider
        self.make_quote = make_quote
        self.certificates = certificates
        self.root = ROOT
        self.entries: dict[Path, Entry] = {}
        self.made: list[Path] = []  # every entry that there ever was
        self.before: Callable[[str, Path], None] = lambda _operation, _path: None

    def make(self, directory: Path) -> None:
        self.before("make", directory)
        if directory.parent != self.root:
            raise _error(errno.ENOENT, directory)
        if directory in self.entries:
            raise _error(errno.EEXIST, directory)
        self.entries[directory] = Entry()
        self.made.append(directory)

    def remove(self, directory: Path) -> None:
        self.before("remove", directory)
        self._entry(directory)
        del self.entries[directory]

    def write(self, path: Path, data: bytes) -> None:
        self.before("write", path)
        entry = self._entry(path.parent)
        if path.name != "inblob":
            raise _error(errno.EACCES if path.name in self._attributes() else errno.ENOENT, path)
        if len(data) > INBLOB_MAX:
            raise _error(errno.EFBIG, path)
        self.put(entry, data)

    def put(self, entry: Entry, data: bytes) -> None:
        """What a write comes to."""
        entry.inblob = data
        entry.generation += 1

    def read(self, path: Path, limit: int) -> bytes:
        self.before("read", path)
        entry = self._entry(path.parent)
        if path.name not in self._attributes():
            raise _error(errno.ENOENT, path)
        match path.name:
            case "inblob":
                raise _error(errno.EACCES, path)
            case "provider":
                found = f"{self.provider}\n".encode()
            case "generation":
                found = f"{entry.generation}\n".encode()
            case _:
                found = self._report(entry, path)
        return found[: limit + 1]

    def _report(self, entry: Entry, path: Path) -> bytes:
        if not entry.inblob:
            raise _error(errno.EINVAL, path)
        if entry.made_at != entry.generation:
            entry.out, entry.aux, entry.made_at = self.make_quote(entry.inblob), self.certificates, entry.generation
        return entry.out if path.name == "outblob" else entry.aux

    def _attributes(self) -> set[str]:
        attributes = {"inblob", "outblob", "provider", "generation"}
        return attributes | {"auxblob"} if self.provider == "sev_guest" else attributes

    def _entry(self, directory: Path) -> Entry:
        if directory not in self.entries:
            raise _error(errno.ENOENT, directory)
        return self.entries[directory]


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
