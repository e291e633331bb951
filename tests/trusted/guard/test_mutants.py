"""Guards with one thing missing, each in a copy of the source: a test must fail on every one, by an assertion.

A mutant is a change of the syntax tree, found by the function and the names that it is about, so that a guard written
in other words has the same mutants. A change that finds nothing to change fails: the mutant is to be adapted.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tsqp

pytestmark = pytest.mark.slow  # a minute in all: each mutant is a process that runs a part of the guard's tests

HERE = Path(__file__).parent
ROOT = next(folder for folder in HERE.parents if (folder / "pyproject.toml").is_file())
CORE, LIVES, DIGESTS = "test_core.py", "test_lives.py", "test_digests.py"
KERNELS, LINEARS, PADS, POOL, SOURCES, WEIGHTS = (
    f"trusted/guard/{name}.py" for name in ("kernels", "linears", "pads", "pool", "sources", "weights")
)

# One process loads what takes long to load, and a child of it runs the tests of each copy: a line of test names in, the
# exit status out. Loops are not compiled, which takes seconds for each copy; the tests themselves run compiled ones.
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

# Changes of the syntax tree

Found = Callable[[ast.AST], bool]
New = Callable[[Any], "ast.AST | None"]  # the node in the place of one; None: nothing is there any more


class Change(NamedTuple):
    """In ``file``, below ``function`` (``Class.function``, or "" for all of it), ``found`` nodes become ``new``."""

    file: str
    function: str
    found: Found
    new: New

    def make(self, source: str) -> str:
        tree = ast.parse(source)
        changer = _Changer(self.found, self.new)
        changer.visit(_inside(tree, self.function))
        assert changer.count, f"nothing to change in {self.file} {self.function}: adapt the mutant"
        return ast.unparse(ast.fix_missing_locations(tree))


class _Changer(ast.NodeTransformer):
    def __init__(self, found: Found, new: New) -> None:
        self.count = 0
        self._found, self._new = found, new

    def visit(self, node: ast.AST) -> Any:
        if not self._found(node):
            return self.generic_visit(node)
        self.count += 1
        return ast.Pass() if (new := self._new(node)) is None else new


def _inside(tree: ast.AST, path: str) -> ast.AST:
    for name in path.split(".") if path else ():
        (tree,) = (node for node in ast.walk(tree) if getattr(node, "name", None) == name and hasattr(node, "body"))
    return tree


def names(node: ast.AST) -> set[str]:
    """All identifiers in it."""
    return {getattr(part, "id", None) or getattr(part, "attr", None) or "" for part in ast.walk(node)} - {""}


def called(node: ast.AST) -> str:
    """The name of what an expression or statement calls, or ""."""
    call = node.value if isinstance(node, ast.Expr) else node
    return ast.unparse(call.func).split(".")[-1] if isinstance(call, ast.Call) else ""


def calling(name: str, *about: str) -> Found:
    """Statements that are a call of ``name``, with ``about`` in it."""
    return lambda node: isinstance(node, ast.Expr) and called(node) == name and set(about) <= names(node)


def storing(*about: str) -> Found:
    """Assignments whose targets are of those names."""

    def found(node: ast.AST) -> bool:
        if not isinstance(node, ast.Assign | ast.AugAssign):
            return False
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(set(about) <= names(target) for target in targets)

    return found


def asking(*about: str) -> Found:
    """``if`` statements whose condition is about those names."""
    return lambda node: isinstance(node, ast.If) and set(about) <= names(node.test)


def call_of(name: str, *about: str) -> Found:
    """The expression that calls ``name``, with ``about`` in it."""
    return lambda node: isinstance(node, ast.Call) and called(node) == name and set(about) <= names(node)


def with_of(name: str) -> Found:
    return lambda node: isinstance(node, ast.With) and any(name in names(item) for item in node.items)


def nothing(_: Any) -> None:
    return None


def expression(text: str) -> New:
    return lambda _: ast.parse(text, mode="eval").body


def statement(text: str) -> New:
    return lambda _: ast.parse(text).body[0]


def never(node: ast.If) -> ast.If:
    """The same ``if``, never taken."""
    node.test = ast.Constant(value=False)
    return node


def only_if(condition: str) -> Callable[[ast.If], ast.If]:
    def narrower(node: ast.If) -> ast.If:
        node.test = ast.BoolOp(ast.And(), [ast.parse(condition, mode="eval").body, node.test])
        return node

    return narrower


def condition(text: str) -> Callable[[ast.If], ast.If]:
    def other(node: ast.If) -> ast.If:
        node.test = ast.parse(text, mode="eval").body
        return node

    return other


def body_only(node: ast.With) -> ast.If:
    """A ``with`` without what it holds."""
    return ast.If(test=ast.Constant(value=True), body=node.body, orelse=[])


def value(text: str) -> New:
    """The same assignment of something else; ``OLD`` in ``text`` is what was assigned."""

    def changed(node: Any) -> Any:
        node.value = ast.parse(text.replace("OLD", f"({ast.unparse(node.value)})"), mode="eval").body
        return node

    return changed


def first_argument(text: str) -> Callable[[ast.Call], ast.Call]:
    def changed(node: ast.Call) -> ast.Call:
        node.args[0] = ast.parse(text.replace("OLD", f"({ast.unparse(node.args[0])})"), mode="eval").body
        return node

    return changed


def last_argument(text: str) -> Callable[[ast.Call], ast.Call]:
    def changed(node: ast.Call) -> ast.Call:
        node.args[-1] = ast.parse(text.replace("OLD", f"({ast.unparse(node.args[-1])})"), mode="eval").body
        return node

    return changed


class Before:
    """A statement to be put before those that are found."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, node: Any) -> ast.AST | None:
        (first,) = ast.parse(self.text).body
        return ast.If(test=ast.Constant(value=True), body=[first, node], orelse=[])


class Mutant(NamedTuple):
    """``test`` (a file and a test of it) fails, and by an assertion, once ``changes`` are made."""

    name: str
    test: str
    changes: Sequence[Change]


def mutant(name: str, test: str, *changes: tuple[str, str, Found, New]) -> Mutant:
    return Mutant(name, test, [Change(*change) for change in changes])


def core(test: str) -> str:
    return f"{CORE}::{test}"


def lives(test: str) -> str:
    return f"{LIVES}::{test}"


def desks(test: str) -> str:
    return f"test_desks.py::{test}"


def digests(test: str) -> str:
    return f"{DIGESTS}::{test}"


def slices(test: str) -> str:
    return f"test_slices.py::{test}"


EVERY_SLICE = slices("test_the_slice_of_a_wrong_column_is_named[{}-masked]")
SUM_DIFFERS = (
    "verdict == OK and _dot(reply[row - first], vectors[k]) != "
    "sum(int(expected[row, n * len(vectors) + k]) for n in range(len(bounds) - 1)) % P"
)
WRONG_LAST = core("test_one_wrong_element_is_found_in_every_row[36-masked]")
AFTERWARDS = core("test_after_a_failure_nothing_is_checked_with_the_same_vectors[masked]")
PADS_DIFFER = core("test_equal_inputs_reach_the_worker_under_different_pads")
ERASED = core("test_used_pads_and_their_products_are_erased")
ERASED_PAD = core("test_an_erased_pad_masks_nothing")
STORED_ONCE = lives("test_each_number_is_stored_once_and_is_the_final_one[masked]")
ENTROPY = lives("test_check_vectors_are_expanded_from_32_bytes_each")
BATCH = lives("test_a_batch_leaves_no_key_pad_or_product")
LOCKED = lives("test_pads_change_hands_under_the_lock_only[{}]")

CHECK = asking("_dot", "expected")
ONE_STORE = storing("out", "row")

MUTANTS = [
    # what is sent
    mutant("no pad is added", PADS_DIFFER, (KERNELS, "quantise_and_mask", call_of("_reduce"), expression("field[i]"))),
    mutant(
        "plaintext first, x' over it",
        STORED_ONCE,
        (KERNELS, "quantise_and_mask", ONE_STORE, Before("out[row, i] = values[i] & 0xFFFF")),
    ),
    mutant(
        "x' is stored twice", STORED_ONCE, (KERNELS, "quantise_and_mask", ONE_STORE, Before("out[row, i] = field[i]"))
    ),
    mutant(
        "an erased pad masks",
        ERASED_PAD,
        (KERNELS, "quantise_and_mask", storing("greatest"), value("np.uint32(0)")),
    ),
    mutant(
        "a verdict on what is sent is ignored",
        ERASED_PAD,
        (LINEARS, "refuse", call_of("divmod"), expression("(0, kernels.OK)")),
    ),
    mutant(
        "x' is read back",
        core("test_what_was_written_for_the_worker_is_not_read_back[masked]"),
        (KERNELS, "quantise_and_mask", call_of("_dot"), first_argument("out[row]")),
    ),
    mutant(
        "no clamp",
        core("test_no_activation_leaves_its_bound_whatever_its_scale"),
        ("arith/loops.py", "quantise_row", call_of("min"), expression("nearest")),
    ),
    # the check
    mutant("no check", WRONG_LAST, (KERNELS, "verify_and_unmask", CHECK, never)),
    mutant("no check of the last row", WRONG_LAST, (KERNELS, "verify_and_unmask", CHECK, only_if("row + 1 < end"))),
    mutant(
        "one vector is enough",
        core("test_an_error_that_one_check_vector_does_not_see[0-masked]"),
        (KERNELS, "verify_and_unmask", CHECK, only_if("k == 0")),
    ),
    mutant(
        "16 bits of a check",
        lives("test_every_bit_of_a_check_is_compared"),
        (
            KERNELS,
            "verify_and_unmask",
            CHECK,
            only_if("(_dot(own, vectors[k, begin:stop]) ^ expected[row, part * vectors.shape[0] + k]) & 0xFFFF"),
        ),
    ),
    mutant(
        "16 bits of the check of pads",
        lives("test_every_bit_of_the_check_of_pads_is_compared"),
        (
            WEIGHTS,
            "check_products",
            lambda node: isinstance(node, ast.Compare) and {"expected", "found"} <= names(node),
            expression("(expected & 0xFFFF) == (found & 0xFFFF)"),  # of one slice
        ),
    ),
    mutant(
        "the last row is skipped",
        WRONG_LAST,
        (LINEARS, "_judge", calling("fill"), statement("verdicts.fill(kernels.OK)")),
        (LINEARS, "_verify_and_unmask", call_of("verify_and_unmask"), last_argument("OLD - 1")),
    ),
    mutant("a verdict on a reply is ignored", WRONG_LAST, (LINEARS, "refuse", asking("OK"), never)),
    mutant(
        "a row has the verdict of the last product",
        desks("test_the_verdict_on_one_product_is_none_on_the_next[masked]"),
        (LINEARS, "_judge", calling("fill"), nothing),
    ),
    mutant(
        "memory of a product under way is another's too",
        desks("test_a_product_that_is_not_there_is_not_released[masked]"),
        (LINEARS, "PendingProduct.release", asking("done"), lambda node: ast.If(ast.Constant(True), node.body, [])),
    ),
    mutant(
        "memory is idle twice",
        desks("test_a_desk_released_twice_is_idle_once[masked]"),
        (LINEARS, "PendingProduct.release", storing("done"), nothing),
    ),
    mutant(
        "memory is left after a failure",
        desks("test_after_a_failure_no_desk_is_left_and_the_first_error_stays[masked]"),
        (LINEARS, "CheckedLinears.close", calling("clear"), nothing),
    ),
    mutant(
        "no range check",
        core("test_another_way_to_write_the_right_number_is_out_of_range[masked]"),
        (
            KERNELS,
            "verify_and_unmask",
            lambda node: isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "largest",
            value("np.uint32(0)"),
        ),
    ),
    mutant(
        "a reply is checked where the worker can change it",
        core("test_a_reply_is_read_once[masked]"),
        (LINEARS, "_verify_and_unmask", calling("copyto"), statement("unchecked_y = reply[one.first : end]")),
    ),
    # slices
    mutant(
        "no check of the first slice", EVERY_SLICE.format(0), (KERNELS, "verify_and_unmask", CHECK, only_if("part"))
    ),
    mutant(
        "no check of the last slice",
        EVERY_SLICE.format(23),
        (KERNELS, "verify_and_unmask", CHECK, only_if("part + 2 < len(bounds)")),
    ),
    mutant(
        "the first column of a slice is not checked",
        EVERY_SLICE.format(20),
        (KERNELS, "verify_and_unmask", call_of("_dot"), expression("_dot(own[1:], vectors[k, begin + 1:stop])")),
        (KERNELS, "project_weights", storing("element"), value("OLD * (j > bounds[part])")),
    ),
    mutant(
        "slices are checked as one",
        slices("test_errors_that_cancel_over_all_slices_are_found[columns0-masked]"),
        (KERNELS, "verify_and_unmask", CHECK, condition(SUM_DIFFERS)),
    ),
    mutant(
        "another slice is named",
        EVERY_SLICE.format(7),
        (LINEARS, "refuse", call_of("divmod"), expression("(0, int(verdicts[row]) % kernels.KINDS)")),
    ),
    # entropy
    mutant("vectors are not secret", ENTROPY, (WEIGHTS, "of", call_of("urandom"), expression("bytes(KEY_BYTES)"))),
    mutant(
        "vectors of 32 bits of entropy",
        ENTROPY,
        (WEIGHTS, "of", call_of("urandom"), expression("os.urandom(4) * (KEY_BYTES // 4)")),
    ),
    mutant(
        "vectors of 15 bits",
        ENTROPY,
        (WEIGHTS, "of", storing("projections"), Before("vectors &= np.uint32(0x7FFF)")),
    ),
    mutant(
        "forgotten vectors are known",
        lives("test_forgotten_vectors_are_expanded_from_32_other_bytes"),
        (WEIGHTS, "forget", call_of("urandom"), expression("bytes(KEY_BYTES)")),
    ),
    mutant(
        "every connection has the same root",
        PADS_DIFFER,
        (POOL, "PadPool.__init__", call_of("urandom"), expression("bytes(range(KEY_BYTES))")),
    ),
    mutant(
        "a root of 8 bytes",
        lives("test_the_root_of_pads_is_32_bytes_of_its_own"),
        (POOL, "PadPool.__init__", call_of("urandom"), expression("os.urandom(8) * (KEY_BYTES // 8)")),
    ),
    mutant(
        "the ratchet stands still",
        core("test_the_ratchet_goes_on"),
        (PADS, "next_key", storing("_state"), statement("key = secret_bytes(stream[KEY_BYTES:])")),
    ),
    mutant(
        "two blocks of one key",
        lives("test_each_block_has_a_key_of_its_own"),
        (
            POOL,
            "PadPool.make",
            lambda node: isinstance(node, ast.ListComp),
            expression("[PadBlock(bytearray(key)) for key in [self._ratchet.next_key()] for _ in range(count)]"),
        ),
    ),
    # lives
    mutant(
        "a pad is used twice",
        core("test_equal_rows_of_a_block_reach_the_worker_under_different_pads"),
        (PADS, "claim", storing("_used"), nothing),
        (KERNELS, "quantise_and_mask", storing("pads"), nothing),
    ),
    mutant("a row is handed out twice", core("test_a_row_is_handed_out_once"), (PADS, "claim", asking("left"), never)),
    mutant(
        "a block that was opened is opened again",
        "test_pads.py::test_a_block_that_was_opened_is_not_opened_in_other_memory",
        (PADS, "PadBlock.pads", asking("_pads", "room"), never),
    ),
    mutant(
        "pads in memory of a call stay after a failure",
        core("test_pads_of_a_call_that_is_interrupted_are_erased_wherever_they_lie"),
        (POOL, "pads_together", call_of("pads", "own"), expression("one.block.pads(0, BLOCK_ROWS, width, own.copy())")),
    ),
    mutant("keys stay", ERASED, (PADS, "_wipe_key", calling("wipe"), nothing)),
    mutant("used pads stay", ERASED, (KERNELS, "quantise_and_mask", storing("pads"), nothing)),
    mutant("products of used pads stay", ERASED, (KERNELS, "verify_and_unmask", storing("products"), nothing)),
    mutant(
        "a copy of a key stays after its expansion",
        lives("test_a_copy_of_a_key_ends_with_its_expansion"),
        (PADS, "PadBlock.pads", calling("wipe"), nothing),
    ),
    mutant("copies of keys stay after products", BATCH, (POOL, "_make", calling("wipe"), nothing)),
    mutant("pads and products of a batch stay", BATCH, (POOL, "_make", calling("fill"), nothing)),
    mutant(
        "products of a batch stay",
        BATCH,
        (
            POOL,
            "_make",
            lambda node: isinstance(node, ast.For) and {"pads", "unchecked"} <= names(node.iter),
            statement("pads.fill(ERASED)"),
        ),
    ),
    mutant(
        "the stream of a ratchet stays",
        lives("test_the_stream_of_a_ratchet_is_wiped"),
        (PADS, "next_key", calling("wipe"), nothing),
    ),
    mutant(
        "pads of a call refused at its start stay",
        lives("test_pads_of_a_call_refused_at_its_start_are_lost"),
        (LINEARS, "start", calling("lose"), nothing),
    ),
    mutant("a fork goes on", core("test_another_process_gets_no_pads"), (PADS, "refuse", asking("getpid"), never)),
    mutant(
        "a fork checks with zeros",
        core("test_another_process_checks_nothing[verified]"),
        (LINEARS, "_judge", asking("getpid"), never),
    ),
    mutant(
        "keys stay where they were sent from",
        lives("test_keys_do_not_stay_where_they_were_sent_from[True]"),
        (SOURCES, "DealerPadSource.products", calling("wipe"), nothing),
    ),
    # after a failure
    mutant("vectors stay after a failure", AFTERWARDS, (LINEARS, "end", calling("close"), nothing)),
    mutant("vectors are not overwritten", AFTERWARDS, (WEIGHTS, "forget", calling("expand"), nothing)),
    mutant(
        "the session goes on after a failure",
        AFTERWARDS,
        (LINEARS, "CheckedLinears", calling("fail"), nothing),
    ),
    mutant(
        "a source that failed is asked again",
        lives("test_a_source_that_failed_is_not_asked_again"),
        (POOL, "_make", asking("failures"), never),
    ),
    # the dealer
    mutant(
        "a dealer's products stay where it can change them",
        lives("test_a_dealers_products_are_a_copy_that_it_cannot_change"),
        (SOURCES, "DealerPadSource.products", call_of("copy"), lambda node: node.func.value),
    ),
    mutant(
        "two threads ask a dealer at once",
        lives("test_a_dealer_is_asked_by_one_thread_at_a_time"),
        (SOURCES, "DealerPadSource.products", lambda node: isinstance(node, ast.With), body_only),
    ),
    # locks
    mutant("rows without the lock", LOCKED.format("take"), (POOL, "PadPool.take", with_of("_lock"), body_only)),
    mutant("blocks without the lock", LOCKED.format("make"), (POOL, "PadPool.make", with_of("_lock"), body_only)),
    mutant("an end without the lock", LOCKED.format("close"), (POOL, "PadPool.close", with_of("_lock"), body_only)),
    # digests
    mutant(
        "tokenizer and template are in no digest",
        digests("test_all_that_makes_tokens_of_text_is_in_it"),
        ("trusted/private.py", "ModelDigest.__init__", call_of("text_format"), expression("TextFormat('', ())")),
        (
            "trusted/private.py",
            "",
            lambda node: isinstance(node, ast.ImportFrom) and node.module == "tsqp.checkpoint.base",
            statement("from tsqp.checkpoint.base import Checkpoint, TextFormat"),
        ),
    ),
    mutant(
        "the shape is in no digest",
        digests("test_every_number_of_the_configuration_is_in_it"),
        ("trusted/private.py", "ModelDigest.__init__", call_of("asdict", "config"), expression("None")),
    ),
    mutant(
        "norms are in no digest",
        digests("test_the_last_element_of_every_tensor_is_in_it"),
        ("trusted/private.py", "load_private_model", calling("add", "weight"), nothing),
    ),
    mutant(
        "a dealer's digests are not compared",
        digests("test_neither_a_worker_nor_a_dealer_may_have_other_weights"),
        (
            "api/private_sessions.py",
            "PrivateSessions.open",
            lambda node: isinstance(node, ast.keyword) and node.arg == "digests",
            value("OLD if role == 'worker' else None"),
        ),
    ),
]


class Copy:
    """A copy of the package, files of which can be changed for one run of tests."""

    def __init__(self, directory: Path) -> None:
        self._package = directory / "tsqp"
        self._report = directory / "report.txt"
        shutil.copytree(Path(tsqp.__file__).parent, self._package, ignore=shutil.ignore_patterns("__pycache__"))
        self._runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(directory), str(self._report)],
            cwd=ROOT,
            env={**os.environ, **UNCOMPILED, "TMPDIR": str(directory)},  # its children leave what they make
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def test(self, tests: str, changes: Sequence[Change] = ()) -> tuple[int, str]:
        """The exit status of ``tests``, names of files here and tests of them, after ``changes``; what was printed."""
        before = {change.file: (self._package / change.file).read_text() for change in changes}
        try:
            for change in changes:
                path = self._package / change.file
                path.write_text(change.make(path.read_text()))
            return self._run(" ".join(str(HERE / test) for test in tests.split()))
        finally:
            for file, text in before.items():
                (self._package / file).write_text(text)

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
    status, report = copy.test(f"{CORE} {LIVES} {DIGESTS}")
    assert status == 0, report


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_found(mutant: Mutant, copy: Copy) -> None:
    status, report = copy.test(mutant.test, mutant.changes)
    assert status == 1, report
    assert re.search("^E +(AssertionError|assert |Failed: DID NOT RAISE)", report, re.MULTILINE), report
