"""Check what ruff has no rule for: the length of functions, and imports from elsewhere.

    python3 .ci/check.py FILE...

A function has at most 40 lines without its docstring. The program imports nothing but Python's
standard library.
"""

from __future__ import annotations

import ast
import pathlib
import sys

MAX_FUNCTION_LINES = 40
OWN_MODULES = {"opencode_proxy", "rig"}
TEST_CLIENTS = {"openai", "anthropic", "pydantic", "pydantic_ai"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def length_of(function):
    """Return the lines of a function from `def` to its end, without its docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def imported_by(node):
    """Return the top-level names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.partition(".")[0]}
    return set()


def faults_of(path):
    """Yield what is wrong with a file."""
    allowed = {*sys.stdlib_module_names, *OWN_MODULES}
    if path.name.startswith("test_"):
        allowed |= TEST_CLIENTS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, FUNCTIONS) and length_of(node) > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {length_of(node)} lines"
        for name in sorted(imported_by(node) - allowed):
            yield f"{path}:{node.lineno}: {name} is not in the standard library"


def main():
    faults = [fault for name in sys.argv[1:] for fault in faults_of(pathlib.Path(name))]
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
