"""Changes one small thing of the guard at a time and runs its fast tests: prints the changes that no test notices.

    python scripts/mutate_guard.py [--sample N] [--seed S] [--only FILE]

Operators, comparisons, constants, conditions, statements that are deleted, arguments that change places; in a copy of
the package, with loops uncompiled. docs/audit.md explains the survivors.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HERE = next((ROOT / "tests").rglob("guard/test_core.py")).parent
GUARD = ("kernels", "linears", "pads", "pool", "sources", "weights")
FILES = [*(f"trusted/guard/{name}.py" for name in GUARD), "arith/expand.py", "arith/digits.py", "arith/field.py"]
FILES.append("trusted/step_loops.py")
FUNCTIONS = {"trusted/step_loops.py": ("_mask", "_unmask")}  # what of a file is the guard's, where that is not all
TESTS = ["test_core.py", "test_lives.py", "test_pads.py", "test_kernels.py", "test_weights.py", "test_pool.py"]
TESTS.append("test_step_loops.py")
# Whole models, threads and processes, and the largest shapes: too slow with loops uncompiled.
SLOW = "hostile or LLM or idle or thread or restart or digest or pinned or are_refused or interrupt or norms or a_run"
SLOW += " or 6553 or 140000"
LIMIT_S = 60
MEMORY = 4 << 30

OPERATORS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.RShift: ast.LShift, ast.LShift: ast.RShift},
    **{ast.BitXor: ast.BitAnd, ast.Div: ast.Mult},
}
COMPARISONS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What this node may become, and in words."""
    other: Any
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            other = copy.deepcopy(node)
            other.op = OPERATORS[type(op)]()
            yield f"{type(op).__name__} -> {type(other.op).__name__}", other
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            other = copy.deepcopy(node)
            other.ops = [COMPARISONS[type(op)]()]
            yield f"{type(op).__name__} -> {type(other.ops[0]).__name__}", other
        case ast.BoolOp(op=op):
            other = copy.deepcopy(node)
            other.op = ast.And() if isinstance(op, ast.Or) else ast.Or()
            yield "and <-> or", other
        case ast.Constant(value=bool(value)):
            yield f"{value} -> {not value}", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield f"{value} -> {value + 1}", ast.Constant(value + 1)
        case ast.If():
            for value in (True, False):
                other = copy.deepcopy(node)
                other.test = ast.Constant(value)
                yield f"if {value}", other
    if isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
        other = copy.deepcopy(node)
        other.args[0], other.args[1] = other.args[1], other.args[0]
        yield "first two arguments change places", other
    simple = isinstance(node, ast.Assign | ast.AugAssign | ast.Raise)
    if simple or (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)):
        yield "deleted", ast.Pass()


class Replace(ast.NodeTransformer):
    def __init__(self, number: int, new: ast.AST) -> None:
        self._left, self._new = number, new

    def visit(self, node: ast.AST) -> ast.AST:
        self._left -= 1
        return self._new if self._left == -1 else self.generic_visit(node)


def visited(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, in the order that a transformer comes to them."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from visited(child)


def mutants(file: str) -> Iterator[tuple[str, str]]:
    """Every mutant of one file: in words, and its source."""
    source = (ROOT / "src" / "tsqp" / file).read_text()
    tree = ast.parse(source)
    hints = {id(part) for node in ast.walk(tree) for hint in _hints(node) for part in ast.walk(hint)}
    if file in FUNCTIONS:
        parts = [node for node in tree.body if getattr(node, "name", "") in FUNCTIONS[file]]
        hints |= {id(node) for node in ast.walk(tree)} - {id(node) for part in parts for node in ast.walk(part)}
    for number, node in enumerate(visited(tree)):
        if id(node) in hints:
            continue
        for words, new in changes(node):
            place = ast.unparse(node).splitlines()[0][:70]
            mutated = Replace(number, new).visit(copy.deepcopy(tree))
            line = getattr(node, "lineno", 0)
            yield f"{file}:{line} [{words}] {place}", ast.unparse(ast.fix_missing_locations(mutated))


def _hints(node: ast.AST) -> list[ast.AST]:
    """Below a node: type hints, decorators, and from how many rows on a second thread helps."""
    hints = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    idle = [node] if isinstance(node, ast.keyword) and node.arg == "least" else []  # who computes, not what
    return [hint for hint in hints if hint is not None] + list(getattr(node, "decorator_list", [])) + idle


def survives(package: Path, file: str, source: str) -> bool:
    """Whether the tests pass on this source of one file: in a fork, so that what takes long to load is loaded once."""
    path = package / file
    before = path.read_text()
    path.write_text(source)
    try:
        child = os.fork()
        if child == 0:
            os._exit(_tests(package))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        path.write_text(before)


def _tests(package: Path) -> int:
    import pytest

    signal.alarm(LIMIT_S)  # a mutant that hangs is noticed: it ends by this signal
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # one that hands out pads without end, by this
    null = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(null, standard)
    os.chdir(ROOT)
    sys.path[:0] = [str(package.parent), str(ROOT)]
    options = ["-xqp", "no:cacheprovider", "--noconftest", "-c", os.devnull, "--rootdir", ".", "-W", "ignore"]
    return int(pytest.main([*options, "-k", f"not ({SLOW})", *(str(HERE / name) for name in TESTS)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=0, help="so many mutants, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path holds this")
    chosen = parser.parse_args()
    found = [(file, *mutant) for file in FILES if chosen.only in file for mutant in mutants(file)]
    if chosen.sample:
        found = random.Random(chosen.seed).sample(found, min(chosen.sample, len(found)))
    os.environ |= {"NUMBA_DISABLE_JIT": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("cryptography.hazmat.primitives.ciphers", "hypothesis", "numba", "numpy", "pytest", "torch"):
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory) / "tsqp"
        shutil.copytree(ROOT / "src" / "tsqp", package, ignore=shutil.ignore_patterns("__pycache__"))
        file = FILES[0]
        if not survives(package, file, (package / file).read_text()):
            sys.exit("the tests fail without any change")
        left = 0
        for number, (file, words, source) in enumerate(found, 1):
            if survives(package, file, source):
                left += 1
                sys.stdout.write(f"survived: {words}\n")
            sys.stderr.write(f"\r{number} of {len(found)}, {left} survived")
            sys.stdout.flush()
    sys.stdout.write(f"\n{left} of {len(found)} survived\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
