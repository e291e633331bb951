from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from tsqp.checkpoint import hub, open_checkpoint
from tsqp.errors import CheckpointError, CheckpointNotFound, FetchError, UnsupportedModel

from .makers import make_model


@pytest.mark.parametrize(
    "model", ["", "nowhere", "./nowhere", "/nowhere/at/all", "a.gguf", "dir/a.gguf", "~/nowhere/x/y"]
)
def test_what_is_not_there(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="directory"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_offline_and_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="nobody/nothing is not in the local Hub cache and HF_HUB_OFFLINE is set"):
        open_checkpoint("nobody/nothing")


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, ConnectionError("first line\nsecond line"))
    with pytest.raises(FetchError, match=r"first line$"):
        open_checkpoint("org/name")
    _fail_with(monkeypatch, errors.HFValidationError("bad"))
    with pytest.raises(CheckpointNotFound, match="org/name"):
        open_checkpoint("org/name")


def test_hub_snapshot_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path / "snapshot")
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").config.num_layers == 3
    assert asked[0][0] == "org/name"
    assert not any("bin" in pattern for pattern in asked[0][1])
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(CheckpointNotFound, match=r"config\.json"):  # a directory of that name comes first
        open_checkpoint("org/name")
    assert hub.download_from_hub("org/name") == tmp_path / "snapshot"


def test_importing_the_package_is_light() -> None:
    code = "import sys, tsqp.checkpoint; print([m for m in ('torch', 'gguf', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
