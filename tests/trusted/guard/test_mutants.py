"""Guards with one thing missing, each in a copy of the source: the tests of ``test_core.py`` must fail on every one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

import tsqp

CORE = Path(__file__).with_name("test_core.py")
ROOT = CORE.parents[2]

Edit = tuple[str, str, str]  # a file of the guard, a text that is there once, and the one in its place

# One process loads what takes long to load, and a child of it runs the tests of each copy: a line of test names in, the
# exit status out. Loops are not compiled, which takes seconds for each copy; test_core.py itself runs compiled ones.
RUNNER = """\
import os, sys
import cryptography.hazmat.primitives.ciphers, numba, numpy, pytest, torch
copy, report = sys.argv[1:]
sys.path.insert(0, copy)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        for standard in (1, 2):
            os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), standard)
        import tsqp
        if not tsqp.__file__.startswith(copy):
            os._exit(9)
        options = ["-c", os.devnull, "--rootdir", ".", "--noconftest", "-xqp", "no:cacheprovider"]
        status = pytest.main([*options, "-W", "ignore::RuntimeWarning", *line.split()])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


UNCOMPILED = {"NUMBA_DISABLE_JIT": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class Mutant(NamedTuple):
    """``test`` of test_core.py fails, and by an assertion, once ``edits`` are made."""

    name: str
    test: str
    edits: Sequence[Edit]


def mutant(name: str, test: str, *edits: Edit) -> Mutant:
    return Mutant(name, test, edits)


WRONG_LAST = "test_one_wrong_element_is_found_in_every_row[36-masked]"
AFTERWARDS = "test_after_a_failure_nothing_is_checked_with_the_same_vectors[masked]"
PADS_DIFFER = "test_equal_inputs_reach_the_worker_under_different_pads"
ERASED = "test_used_pads_and_their_products_are_erased"
DOT = "if verdict == OK and _dot(reply[row], secrets[k]) != expected[row, k]:"

MUTANTS = [
    mutant(
        "a pad is used twice",
        PADS_DIFFER,
        ("pads.py", "self._used += rows", "self._used += 0"),
        ("kernels.py", "pads[row, i] = ERASED", "pass"),
    ),
    mutant(
        "a row is handed out twice", "test_a_row_is_handed_out_once", ("pads.py", "if rows > self.left:", "if False:")
    ),
    mutant(
        "the ratchet stands still",
        "test_the_ratchet_goes_on",
        ("pads.py", "self._state[:] = memoryview(stream)[:KEY_BYTES]", "pass"),
    ),
    mutant(
        "every connection has the same root",
        PADS_DIFFER,
        ("pool.py", "Ratchet(os.urandom(KEY_BYTES))", "Ratchet(bytes(range(KEY_BYTES)))"),
    ),
    mutant(
        "a fork goes on",
        "test_another_process_gets_no_pads",
        ("pads.py", "if os.getpid() != self.process:", "if False:"),
    ),
    mutant("keys stay", ERASED, ("pads.py", "if self._pads is not None and self._products is not None:", "if False:")),
    mutant("used pads stay", ERASED, ("kernels.py", "pads[row, i] = ERASED", "pass")),
    mutant("products of used pads stay", ERASED, ("kernels.py", "products[row, j] = ERASED", "pass")),
    mutant("no pad is added", PADS_DIFFER, ("kernels.py", "_reduce(np.uint32(pad + field[i]))", "field[i]")),
    mutant(
        "an erased pad masks",
        "test_an_erased_pad_masks_nothing",
        ("kernels.py", "erased |= np.uint32(pad >= _P)", "erased |= np.uint32(0)"),
    ),
    mutant(
        "a verdict on what is sent is ignored",
        "test_an_erased_pad_masks_nothing",
        ("linears.py", "least=2)\n        _judge(verdicts)\n        kind", "least=2)\n        kind"),
    ),
    mutant(
        "a verdict on a reply is ignored",
        WRONG_LAST,
        ("linears.py", "_judge(verdicts)\n        self.checks", "self.checks"),
    ),
    mutant("no check", WRONG_LAST, ("kernels.py", DOT, "if False:")),
    mutant("no check of the last row", WRONG_LAST, ("kernels.py", DOT, DOT.replace("if ", "if row + 1 < end and "))),
    mutant(
        "the last row is skipped",
        WRONG_LAST,
        ("linears.py", "verdicts = np.full(len(out), kernels.UNSEEN", "verdicts = np.full(len(out), kernels.OK"),
        (
            "linears.py",
            "kernels.accept(unchecked_y, *check, *part, 0, piece.rows)",
            "kernels.accept(unchecked_y, *check, *part, 0, piece.rows - 1)",
        ),
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
        ("../../arith/loops.py", "min(max(nearest, -levels), levels)", "nearest"),
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
    mutant(
        "vectors stay after a failure",
        AFTERWARDS,
        ("linears.py", "        self.close()\n\n    def _pieces", "\n    def _pieces"),
    ),
    mutant(
        "vectors are not overwritten",
        AFTERWARDS,
        ("weights.py", "expand(AesKeyStream(os.urandom(KEY_BYTES)), self.secrets)", "pass"),
    ),
    mutant(
        "the session goes on after a failure",
        AFTERWARDS,
        ("linears.py", "self._line.fail(error if", "(lambda _: None)(error if"),
        ("linears.py", 'self._line.fail(ChannelClosed("the', '(lambda _: None)(ChannelClosed("the'),
    ),
    mutant(
        "vectors are not secret",
        "test_check_vectors_are_of_one_connection_only",
        ("weights.py", "AesKeyStream(os.urandom(KEY_BYTES)), secrets", "AesKeyStream(bytes(KEY_BYTES)), secrets"),
    ),
]


class Copy:
    """A copy of the package, files of which can be changed for one run of tests."""

    def __init__(self, directory: Path) -> None:
        self._guard = directory / "tsqp" / "trusted" / "guard"
        self._report = directory / "report.txt"
        shutil.copytree(Path(tsqp.__file__).parent, directory / "tsqp", ignore=shutil.ignore_patterns("__pycache__"))
        self._runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(directory), str(self._report)],
            cwd=ROOT,
            env={**os.environ, **UNCOMPILED},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def test(self, edits: Sequence[Edit] = (), test: str = "") -> tuple[int, str]:
        """The exit status of test_core.py, or of one test of it, with ``edits`` made; and what was printed."""
        before = {file: (self._guard / file).read_text() for file, _, _ in edits}
        for file, old, new in edits:
            text = (self._guard / file).read_text()
            assert text.count(old) == 1, f"{file} has {text.count(old)} places with {old!r}: adapt the mutant"
            (self._guard / file).write_text(text.replace(old, new))
        try:
            return self._run(str(CORE) + test)
        finally:
            for file, text in before.items():
                (self._guard / file).write_text(text)

    def close(self) -> None:
        self._runner.communicate()

    def _run(self, chosen: str) -> tuple[int, str]:
        self._report.unlink(missing_ok=True)
        assert self._runner.stdin is not None
        assert self._runner.stdout is not None
        self._runner.stdin.write(f"{chosen}\n")
        self._runner.stdin.flush()
        status = int(self._runner.stdout.readline())
        return status, self._report.read_text()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    with closing(Copy(tmp_path_factory.mktemp("mutants"))) as made:
        yield made


def test_the_unchanged_copy_passes(copy: Copy) -> None:
    status, report = copy.test()
    assert status == 0, report


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_found(mutant: Mutant, copy: Copy) -> None:
    status, report = copy.test(mutant.edits, "::" + mutant.test)
    assert status == 1, report
    assert re.search("^E +(AssertionError|assert |Failed: DID NOT RAISE)", report, re.MULTILINE), report
