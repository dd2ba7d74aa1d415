"""The names that the text of a module defines and binds, as far as it shows without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sglang_distguard.patching.code_cache import kept
from sglang_distguard.patching.source import ModuleSource

#: Parts of a statement whose names are read, or bound, elsewhere.
_OTHERS = (ast.stmt, ast.ExceptHandler, ast.match_case, ast.comprehension, ast.Lambda)


@dataclass(frozen=True)
class Outline:
    """The names of a module.

    Attributes:
        functions: qualified name -> names of its parameters, in the order of the text.
        generators: qualified names of the functions that yield items, asynchronous ones among
            them, and not those that ``contextlib`` makes with blocks of.
        asynchronous: qualified names of the functions with ``async def``.
        classes: qualified names.
        bound: globals and "Class.attribute" that statements other than an import bind, also the
            functions and classes, ``__slots__``, and globals that only functions bind.
        imported: globals that an import binds.
        declared: names in ``global`` statements.
        is_open: whether there may be more globals, from ``import *`` or assigned by ``globals()``.
    """

    functions: dict[str, tuple[str, ...]]
    generators: frozenset[str]
    asynchronous: frozenset[str]
    classes: frozenset[str]
    bound: frozenset[str]
    imported: frozenset[str]
    declared: frozenset[str]
    is_open: bool


@cache
def outline(source: ModuleSource) -> Outline:
    """Read the outline of a module's text."""
    return Outline(*kept(("outline", source.text), lambda: _read(source)))


def _read(source: ModuleSource) -> tuple[Any, ...]:
    """The fields of an ``Outline``, in a form that ``code_cache`` can store."""
    tree = ast.parse(source.text, source.filename)
    reader = _Reader()
    reader.read(tree.body, "")
    nodes = ast.walk(tree) if "global " in source.text else ()
    declared = {name for it in nodes if isinstance(it, ast.Global) for name in it.names}
    return (
        reader.functions,
        frozenset(reader.generators),
        frozenset(reader.asynchronous),
        frozenset(reader.classes),
        frozenset(reader.bound | declared),
        frozenset(reader.imported),
        frozenset(declared),
        reader.is_open,
    )


class _Reader:
    def __init__(self) -> None:
        self.functions: dict[str, tuple[str, ...]] = {}
        self.generators: set[str] = set()
        self.asynchronous: set[str] = set()
        self.classes: set[str] = set()
        self.bound: set[str] = set()
        self.imported: set[str] = set()
        self.is_open = False

    def read(self, body: Sequence[ast.stmt], prefix: str) -> None:
        """Read the statements of the module, or of the class whose name ``prefix`` begins with."""
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.functions[prefix + node.name] = tuple(_parameters(node.args))
                if isinstance(node, ast.AsyncFunctionDef):
                    self.asynchronous.add(prefix + node.name)
                if _yields(node) and not _makes_a_block(node):
                    self.generators.add(prefix + node.name)
                self.bound.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                self.classes.add(prefix + node.name)
                self.bound.add(prefix + node.name)
                self.read(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
                self.imported.update(prefix + name for name in names)
                self.is_open |= "*" in names
            else:
                self._bind(node, prefix)
                for inner in _bodies(node):
                    self.read(inner, prefix)

    def _bind(self, node: ast.stmt, prefix: str) -> None:
        """Note what the statement itself binds, without the statements in it."""
        pending: list[ast.AST] = [node]
        while pending:
            it = pending.pop()
            if isinstance(it, ast.Name) and isinstance(it.ctx, ast.Store):
                self.bound.add(prefix + it.id)
                if it.id == "__slots__" and isinstance(node, ast.Assign):
                    self.bound.update(prefix + name for name in _texts(node.value))
            elif isinstance(it, ast.Subscript) and isinstance(it.ctx, ast.Store):
                self.is_open |= ast.unparse(it.value) == "globals()"
            pending.extend(
                child for child in ast.iter_child_nodes(it) if not isinstance(child, _OTHERS)
            )


def _texts(node: ast.expr) -> Iterator[str]:
    for it in ast.walk(node):
        if isinstance(it, ast.Constant) and isinstance(it.value, str):
            yield it.value


def _bodies(node: ast.stmt) -> Iterator[Sequence[ast.stmt]]:
    """The statements in a compound statement."""
    for field in ("body", "orelse", "finalbody"):
        yield getattr(node, field, ())
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body


def _makes_a_block(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether ``contextlib.contextmanager``, or its asynchronous kind, decorates ``function``."""
    names = {ast.unparse(it).rpartition(".")[2] for it in function.decorator_list}
    return not names.isdisjoint({"contextmanager", "asynccontextmanager"})


def _yields(function: ast.AST) -> bool:
    """Whether ``function`` itself yields, without the functions in it."""
    pending = list(ast.iter_child_nodes(function))
    while pending:
        it = pending.pop()
        if isinstance(it, (ast.Yield, ast.YieldFrom)):
            return True
        if not isinstance(it, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            pending.extend(ast.iter_child_nodes(it))
    return False


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    for it in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        yield it.arg
    for it in (arguments.vararg, arguments.kwarg):
        if it is not None:
            yield it.arg
