"""Guards with one thing missing, each in a copy of the source: the tests of ``test_core.py`` must fail on every one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import tsqp

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUN = """\
import sys
from pathlib import Path
import pytest
import tsqp
if not Path(tsqp.__file__).is_relative_to(sys.argv[1]):
    sys.exit(f"{tsqp.__file__} is not the copy")
sys.exit(pytest.main(["--noconftest", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


class Mutant(NamedTuple):
    """``test`` of test_core.py fails, by an assertion, where each ``old`` in a file of the guard is ``new``."""

    name: str
    test: str
    edits: Sequence[tuple[str, str, str]]


def mutant(name: str, test: str, *edits: tuple[str, str, str]) -> Mutant:
    return Mutant(name, test, edits)


WRONG_LAST = "test_one_wrong_element_is_found_in_every_row[36-masked]"
AFTERWARDS = "test_after_a_failure_nothing_is_checked_with_the_same_vectors[masked]"
PADS_DIFFER = "test_equal_inputs_reach_the_worker_under_different_pads"
ERASED = "test_used_pads_and_their_products_are_erased"
DOT = "if _dot(reply[row], secrets[k]) != expected[row, k]:"

MUTANTS = [
    mutant(
        "a pad is used twice",
        PADS_DIFFER,
        ("pads.py", "self._used += rows", "self._used += 0"),
        ("kernels.py", "pads[row, i] = ERASED", "pass"),
    ),
    mutant("a row is handed out twice", "test_a_row_is_handed_out_once", ("pads.py", "if rows > self.left:", "if False:")),
    mutant("the ratchet stands still", "test_the_ratchet_goes_on", ("pads.py", "self._state[:] = stream[:KEY_BYTES]", "pass")),
    mutant(
        "every connection has the same root",
        PADS_DIFFER,
        ("pool.py", "Ratchet(os.urandom(KEY_BYTES))", "Ratchet(bytes(range(KEY_BYTES)))"),
    ),
    mutant("a fork goes on", "test_another_process_gets_no_pads", ("pads.py", "if os.getpid() != self._process:", "if False:")),
    mutant("keys stay", ERASED, ("pads.py", "if self._pads is not None and self._products is not None:", "if False:")),
    mutant("used pads stay", ERASED, ("kernels.py", "pads[row, i] = ERASED", "pass")),
    mutant("products of used pads stay", ERASED, ("kernels.py", "products[row, j] = ERASED", "pass")),
    mutant("no pad is added", PADS_DIFFER, ("kernels.py", "_reduce(np.uint32(pads[row, i] + field[i]))", "field[i]")),
    mutant(
        "an erased pad masks",
        "test_an_erased_pad_masks_nothing",
        ("kernels.py", "erased |= np.uint32(pads[row, i] >= _P)", "erased |= np.uint32(0)"),
    ),
    mutant(
        "a verdict on what is sent is ignored",
        "test_an_erased_pad_masks_nothing",
        ("linears.py", "least=2)\n        _judge(verdicts)\n        kind", "least=2)\n        kind"),
    ),
    mutant("a verdict on a reply is ignored", WRONG_LAST, ("linears.py", "_judge(verdicts)\n        self.checks", "self.checks")),
    mutant("no check", WRONG_LAST, ("kernels.py", DOT, "if False:")),
    mutant("no check of the last row", WRONG_LAST, ("kernels.py", DOT, DOT.replace("if ", "if row + 1 < end and "))),
    mutant(
        "the last row is skipped",
        WRONG_LAST,
        ("linears.py", "verdicts = np.full(len(out), kernels.UNSEEN", "verdicts = np.full(len(out), kernels.OK"),
        ("linears.py", "kernels.accept(unchecked_y, *check, *part, 0, piece.rows)", "kernels.accept(unchecked_y, *check, *part, 0, piece.rows - 1)"),
    ),
    mutant(
        "one vector is enough",
        "test_an_error_that_one_check_vector_does_not_see[0-masked]",
        ("kernels.py", DOT, DOT.replace("if ", "if k == 0 and ")),
    ),
    mutant(
        "no range check",
        "test_another_way_to_write_the_right_number_is_out_of_range[masked]",
        ("kernels.py", "outside |= np.uint32(reply[row, j] >= _P)", "outside |= np.uint32(0)"),
    ),
    mutant(
        "no clamp",
        "test_no_activation_leaves_its_bound_whatever_its_scale",
        ("kernels.py", "np.int32(min(max(nearest, -limit), limit))", "np.int32(nearest)"),
    ),
    mutant(
        "x' is read back",
        "test_what_was_written_for_the_worker_is_not_read_back[masked]",
        ("kernels.py", "_dot(field, folded[k])", "_dot(out[row], folded[k])"),
    ),
    mutant(
        "a reply is checked where the worker can change it",
        "test_a_reply_is_read_once[masked]",
        ("linears.py", "np.copyto(unchecked_y, reply[own])", "unchecked_y = reply[own]"),
    ),
    mutant("vectors stay after a failure", AFTERWARDS, ("linears.py", "self.close()  #", "pass  #")),
    mutant("vectors are not overwritten", AFTERWARDS, ("weights.py", "self.secrets.fill(0)", "pass")),
    mutant("the session goes on after a failure", AFTERWARDS, ("linears.py", "self._line.fail(", "isinstance(self, ")),
    mutant(
        "vectors are not secret",
        "test_check_vectors_are_of_one_connection_only",
        ("weights.py", "AesKeyStream(os.urandom(KEY_BYTES))", "AesKeyStream(bytes(KEY_BYTES))"),
    ),
]


class Copy:
    """A copy of the package, one file of which can be another for a moment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        shutil.copytree(Path(tsqp.__file__).parent, directory / "tsqp", ignore=shutil.ignore_patterns("__pycache__"))

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.directory / "tsqp" / "trusted" / "guard" / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} places with {old!r}: adapt the mutant"
        path.write_text(text.replace(old, new))

    def run(self, *tests: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.directory),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(self.directory / "loops"),
        }
        chosen = [str(HERE / "test_core.py") + test for test in tests]
        command = [sys.executable, "-c", RUN, str(self.directory), *chosen]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
