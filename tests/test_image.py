"""`make image`: the engine that answers builds all images from a base by digest; what is missing is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.image import main

BASE = "registry.example/python@sha256:" + "0" * 64


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path with no engine but those that a test puts there."""
    monkeypatch.setenv("PATH", f"{tmp_path}")
    return tmp_path


def engine(directory: Path, name: str, *, answers: bool = True) -> None:
    path = directory / name
    ends = "0" if answers else "1"
    path.write_text(f'#!/bin/sh\n[ "$1" = info ] && exit {ends}\nprintf "%s\\n" "$0 $*" >> "$0.log"\n')
    path.chmod(0o755)


def test_all_images_are_built_by_the_first_engine_that_answers(engines: Path) -> None:
    engine(engines, "docker", answers=False)
    engine(engines, "buildah")
    main([BASE, "--torch-index", "https://torch.example"])
    lines = (engines / "buildah.log").read_text().splitlines()
    given = f"--build-arg=BASE={BASE} --build-arg=TORCH_INDEX=https://torch.example"
    assert lines == [
        f"{engines}/buildah build {given} --file deploy/container/{side}.Containerfile --tag tsqp-{side} ."
        for side in ("server", "worker", "cluster")
    ]
    assert not (engines / "docker.log").exists()


def test_what_is_missing_is_one_line(engines: Path) -> None:
    engine(engines, "docker", answers=False)
    with pytest.raises(SystemExit) as ended:
        main([BASE])
    assert str(ended.value) == (
        "no images: a container engine is missing (no podman, docker does not answer to `docker info`, no buildah)"
    )


@pytest.mark.parametrize(
    "base", ["", "python", "docker.io/library/python:3.13-slim", f"{BASE}0", BASE[:-1], f" {BASE}"]
)
def test_a_base_without_a_digest_is_refused(base: str, engines: Path) -> None:
    engine(engines, "podman")
    with pytest.raises(SystemExit, match="not NAME@sha256:DIGEST"):
        main([base])
    assert not (engines / "podman.log").exists()
