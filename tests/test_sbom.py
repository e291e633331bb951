"""The bill of materials: what Linux installs of the lock, with its hashes; the same tree gives the same bytes."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from scripts.sbom import described, installed

ROOT = Path(__file__).parents[1]
RUN = (ROOT / "requirements" / "run.lock").read_text("utf-8")
LOCK = """# A comment.
aa==1.0 \\
    --hash=sha256:00 \\
    --hash=sha256:11
bb==2 ; sys_platform == 'win32' \\
    --hash=sha256:22
cc==3 ; platform_machine == 'aarch64' \\
    --hash=sha256:33
    # via aa
# Another.
torch==2.13.0
"""


def test_what_linux_installs_is_kept_with_its_hashes() -> None:
    assert installed(LOCK).splitlines() == [
        "aa==1.0 --hash=sha256:00 --hash=sha256:11",
        "cc==3 --hash=sha256:33",
        "torch==2.13.0",
    ]


def test_no_hash_of_the_real_lock_is_lost() -> None:
    text = installed(RUN)
    left_out = [line for line in RUN.splitlines() if re.match(r"(colorama|httpx2-jsfetch)==", line)]
    names = {line.partition("==")[0] for line in text.splitlines()}
    assert names == {line.partition("==")[0] for line in RUN.splitlines() if line[0].isalnum() and line not in left_out}
    hashes = re.findall(r"sha256:[0-9a-f]{64}", text)
    assert set(hashes) <= set(re.findall(r"sha256:[0-9a-f]{64}", RUN))
    assert all("--hash=" in line for line in text.splitlines())
    (block,) = re.findall(r"(?m)^numpy==.*(?:\n +--hash.*)+", RUN)
    (line,) = (line for line in text.splitlines() if line.startswith("numpy=="))
    assert line.count("--hash=") == block.count("--hash=")


def test_the_bill_names_the_commit_and_what_is_asked_for() -> None:
    components: list[dict[str, Any]] = [
        {"name": name, "purl": f"pkg:pypi/{name}@1", "bom-ref": f"L{number}", "description": "x"}
        for number, name in enumerate(("zz", "prompt-toolkit", "aa"))
    ]
    bill = {"metadata": {"component": {"name": "tsqp", "version": "1", "bom-ref": "root"}}, "components": components}
    found = described(bill, ["prompt_toolkit>=3", "zz[extra]>=0"], "abc")
    assert [one["bom-ref"] for one in found["components"]] == [
        "pkg:pypi/aa@1",
        "pkg:pypi/prompt-toolkit@1",
        "pkg:pypi/zz@1",
    ]
    assert found["dependencies"] == [{"ref": "root", "dependsOn": ["pkg:pypi/prompt-toolkit@1", "pkg:pypi/zz@1"]}]
    assert found["metadata"]["component"]["properties"] == [{"name": "tsqp:commit", "value": "abc"}]


@pytest.mark.slow
def test_make_writes_one_that_cyclonedx_accepts(tmp_path: Path) -> None:
    """The tool's own schema is what the script ends with; here: that the command does it, twice the same."""
    texts = []
    for name in ("one.json", "two.json"):
        command = ["make", "sbom", f"SBOM={tmp_path / name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        texts.append((tmp_path / name).read_text("utf-8"))
    assert texts[0] == texts[1]
    bill = json.loads(texts[0])
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert bill["metadata"]["component"]["version"] == project["version"]
    versions = {one["name"]: one["version"] for one in bill["components"]}
    for line in installed(RUN).splitlines():
        requirement = Requirement(line.partition(" --hash")[0])
        assert str(requirement.specifier) == f"=={versions[requirement.name]}"
    unhashed = {one["name"] for one in bill["components"] if '"SHA-256"' not in json.dumps(one)}
    assert unhashed == {"torch"}
