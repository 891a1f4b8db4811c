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
OWN_MODULES = {"opencode_proxy", "test_opencode_proxy", "rig"}
TEST_CLIENTS = {"openai", "anthropic", "pydantic", "pydantic_ai"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def length_of(function):
    """Return the lines of a function from `def` to its end, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines -= first.end_lineno - first.lineno + 1
    return lines


def imported_by(node):
    """Return the top-level names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.partition(".")[0]}
    return set()


def faults_of(path):
    """Yield what is wrong with a file."""
    allowed = OWN_MODULES.union(sys.stdlib_module_names)
    if path.name.startswith("test_"):
        allowed |= TEST_CLIENTS

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, FUNCTIONS) and length_of(node) > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {length_of(node)} lines"
        for name in sorted(imported_by(node) - allowed):
            yield f"{path}:{node.lineno}: {name} is not in the standard library"


def main():
    faults = []
    for name in sys.argv[1:]:
        faults.extend(faults_of(pathlib.Path(name)))
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
