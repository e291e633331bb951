"""Writes a software bill of materials: CycloneDX JSON of what run.lock and constraints.txt install on Linux.

    make sbom      (or: python scripts/sbom.py CYCLONEDX_PY FILE, by the Python of cyclonedx-bom)

`cyclonedx-py` makes the components, with their hashes, from the lock. This script leaves out what Linux never installs,
and adds the commit, the packages that tsqp asks for itself, and that the graph below them is not told. torch has no
hash, as it has none in the lock. The same tree gives the same bytes, and CycloneDX's own schema has to accept them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
CPYTHON = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}


def main() -> None:
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from cyclonedx.validation import make_schemabased_validator

    tool, file = sys.argv[1:]
    lock = (ROOT / "requirements" / "run.lock").read_text("utf-8") + (ROOT / "constraints.txt").read_text("utf-8")
    command = [tool, "requirements", "--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "-"]
    done = subprocess.run(command, input=installed(lock), stdout=subprocess.PIPE, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    bill = described(json.loads(done.stdout), project["dependencies"], commit())
    text = json.dumps(bill, indent=1) + "\n"
    if wrong := make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6).validate_str(text):
        raise SystemExit(f"no bill of materials: {wrong}")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, "utf-8")
    print(f"{file}: {len(bill['components'])} packages")


def installed(lock: str) -> str:
    """The entries of a lock whose markers hold on Linux with CPython, on whatever processor, without the markers."""
    kept = []
    for block in re.split(r"^(?=[A-Za-z0-9])", re.sub(r"(?m)^\s*#.*\n?", "", lock), flags=re.MULTILINE):
        head, *hashes = block.strip().replace("\\\n", "").split(" --hash")
        requirement = Requirement(head) if head else None
        if requirement is None or not _applies(requirement):
            continue
        requirement.marker = None
        kept.append("".join([str(requirement), *(f" --hash{one.rstrip()}" for one in hashes)]) + "\n")
    return "".join(kept)


def _applies(requirement: Requirement) -> bool:
    machines = ("x86_64", "aarch64")
    marker = requirement.marker
    return marker is None or any(marker.evaluate(LINUX | CPYTHON | {"platform_machine": one}) for one in machines)


def described(bill: dict[str, Any], dependencies: list[str], commit: str) -> dict[str, Any]:
    """The bill with references that a new line of the lock does not move, the commit, and what tsqp asks for itself."""
    root = bill["metadata"]["component"]
    root["purl"] = f"pkg:pypi/{root['name']}@{root['version']}"
    root["properties"] = [{"name": "tsqp:commit", "value": commit}]
    for component in bill["components"]:
        del component["description"]  # the lock's line once more
        component["bom-ref"] = component["purl"]
    bill["components"].sort(key=lambda component: component["purl"])
    by_name = {canonicalize_name(component["name"]): component["purl"] for component in bill["components"]}
    direct = sorted({by_name[canonicalize_name(Requirement(line).name)] for line in dependencies})
    bill["dependencies"] = [{"ref": root["bom-ref"], "dependsOn": direct}]
    bill["compositions"] = [{"aggregate": "incomplete", "dependencies": sorted(by_name.values())}]
    return bill


def commit() -> str:
    """Of this tree; with "+changes" where it is not that commit's."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    return f"{found}+changes" if changed else found


if __name__ == "__main__":
    main()
