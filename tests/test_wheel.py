"""The built wheel installs and runs in an empty environment, with nothing of this checkout in reach."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.commands import Home

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_runs_in_an_empty_environment(home: Home, tmp_path: Path) -> None:
    unset = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")  # what is imported is compiled once, and nothing else is
    environment = {name: value for name, value in home.environment.items() if name not in unset}
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel")
    run(*build, "--outdir", tmp_path, ROOT, cwd=tmp_path, environment=environment)
    (wheel,) = tmp_path.glob("tsqp-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python, tsqp = tmp_path / "venv/bin/python", tmp_path / "venv/bin/tsqp"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    lock = ROOT / "requirements/run.lock"
    install = (*pip, "install", "--no-compile")
    run(*install, "--require-hashes", "--no-deps", "-r", lock, cwd=tmp_path, environment=environment)
    run(*install, "-r", ROOT / "constraints.txt", cwd=tmp_path, environment=environment)
    run(*pip, "install", "--no-deps", wheel, cwd=tmp_path, environment=environment)
    run(*pip, "check", cwd=tmp_path, environment=environment)
    options = ("--model", "synthetic:tiny", "--max-tokens", "4", "--json")
    out = run(tsqp, "generate", "hello", *options, cwd=tmp_path, environment=environment)
    assert '"transport": "shm"' in out.splitlines()[-1]
    run(tsqp, "doctor", cwd=tmp_path, environment=environment)
    pages = "from tsqp.server.console.pages import read_pages; print(*sorted(read_pages()))"
    static = (ROOT / "src/tsqp/server/console/static").iterdir()
    of_the_console = run(python, "-c", pages, cwd=tmp_path, environment=environment).split()
    assert of_the_console == sorted(["/", *(f"/console/{file.name}" for file in static)])
    names = run(python, "-c", "import tsqp; print(tsqp.LLM, tsqp.__file__)", cwd=tmp_path, environment=environment)
    assert str(tmp_path) in names
