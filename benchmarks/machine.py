"""Where results go, and where and with what they were measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from tsqp.bench import tree
from tsqp.bench.machine import machine
from tsqp.errors import OptionError

__all__ = ["RESULTS", "add_dirty_ok", "check_tree", "machine"]

RESULTS = Path(__file__).parent / "results"


def add_dirty_ok(parser: argparse.ArgumentParser) -> None:
    """The option ``--dirty-ok`` of a script that writes a result."""
    parser.add_argument(
        "--dirty-ok", action="store_true", help="write the result although files were changed since the last commit"
    )


def check_tree(options: argparse.Namespace) -> None:
    """Before anything is measured: ends the script where no commit names the code."""
    try:
        tree.check_tree(dirty_ok=options.dirty_ok)
    except OptionError as error:
        raise SystemExit(str(error)) from error
