"""The share of branches that the tests reached in each package named; exit code 1 where one is below the floor.

    coverage json -o - | python -m scripts.coverage_gate --floor 95 src/tsqp/trusted/guard src/tsqp/wire

Branches and not lines: coverage's own --fail-under mixes both, and lines are many and easily reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def main() -> int:
    """Print a line for each package. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floor", type=float, required=True, help="percent")
    parser.add_argument("packages", nargs="+", help="folders of the source tree")
    options = parser.parse_args()
    shares = branch_shares(json.load(sys.stdin), options.packages)
    for package, (reached, branches) in shares.items():
        print(f"{package}: {reached} of {branches} branches, {percent(reached, branches):.1f} %")
    return int(any(percent(*share) < options.floor for share in shares.values()))


def branch_shares(report: dict[str, Any], packages: list[str]) -> dict[str, tuple[int, int]]:
    """Branches reached and branches of each package, from a report of ``coverage json``."""
    return {
        package: (
            sum(summary["covered_branches"] for summary in _summaries(report, package)),
            sum(summary["num_branches"] for summary in _summaries(report, package)),
        )
        for package in packages
    }


def percent(reached: int, branches: int) -> float:
    """0 where there are no branches: a package that was renamed or never loaded does not pass."""
    return 100 * reached / branches if branches else 0.0


def _summaries(report: dict[str, Any], package: str) -> list[dict[str, int]]:
    return [entry["summary"] for path, entry in report["files"].items() if path.startswith(f"{package}/")]


if __name__ == "__main__":
    sys.exit(main())
