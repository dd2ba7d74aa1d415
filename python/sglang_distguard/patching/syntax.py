"""What rewriting needs to know of Python's syntax, and how an accessor is called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Union

#: One leading underscore: names with two are mangled inside classes.
_PREFIX = "_distguard_scoped"
Function = Union[ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda]
#: Nodes that bind a name which has no Name node.
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, *COMPREHENSIONS)


def accessor_name(name: str) -> str:
    """The module global through which functions reach the scoped global ``name``."""
    return f"{_PREFIX}_{name}"


def owned(module: str, name: str) -> tuple[str, str]:
    """(owner, attribute) of a global of ``module``: the module, or "module.Class" of "Class.attribute"."""
    owner, _, attribute = f"{module}.{name}".rpartition(".")
    return owner, attribute


def own_nodes(owner: Union[ast.Module, Function]) -> Iterator[ast.AST]:
    """Walk a body without entering the functions and classes nested in it."""
    pending: list[ast.AST] = list(owner.body if isinstance(owner.body, list) else [owner.body])
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, _SCOPES):
            pending.extend(ast.iter_child_nodes(node))


def bound_names(function: Function) -> set[str]:
    """A function's parameters, and the names that it writes or deletes."""
    found = {it.arg for it in ast.walk(function.args) if isinstance(it, ast.arg)}
    for node in own_nodes(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.add(node.id)
    return found
