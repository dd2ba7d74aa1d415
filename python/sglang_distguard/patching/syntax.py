"""Python syntax for the rewriting: names of accessors, and the scope that each name belongs to.

The scopes come from Python's own symbol tables, which are walked in parallel with the syntax tree.
"""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator
from typing import Union

#: Prefix of the globals that changed code uses. One leading underscore: two are mangled in classes.
MARK = "_distguard_"
_PREFIX = f"{MARK}scoped"
#: The module global that is true while any scope exists; ScopedGlobal keeps it (scoped_global.rs).
SCOPES_EXIST = f"{MARK}scopes_exist"
Function = Union[ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda]
Comprehension = Union[ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp]
_COMPREHENSIONS = {
    ast.ListComp: "listcomp",
    ast.SetComp: "setcomp",
    ast.DictComp: "dictcomp",
    ast.GeneratorExp: "genexpr",
}


def accessor_name(name: str) -> str:
    """The module global through which functions reach the scoped global ``name``."""
    return f"{_PREFIX}_{name}"


def owned(module: str, name: str) -> tuple[str, str]:
    """(owner, attribute) of a global; the owner of "Class.attribute" is "module.Class"."""
    owner, _, attribute = f"{module}.{name}".rpartition(".")
    return owner, attribute


def own_nodes(owner: Union[ast.Module, Function]) -> Iterator[ast.AST]:
    """Walk a body without entering the functions, classes and comprehensions nested in it."""
    pending: list[ast.AST] = list(owner.body if isinstance(owner.body, list) else [owner.body])
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (*scopes, *_COMPREHENSIONS)):
            pending.extend(ast.iter_child_nodes(node))


class ScopeTransformer(ast.NodeTransformer):
    """Visitor of a module that knows the symbol table of the scope in which each node is evaluated.

    Decorators, defaults and annotations of a function belong to the scope around the function. So
    does the iterable of a comprehension's first loop.
    """

    def __init__(self, table: symtable.SymbolTable) -> None:
        self._table = table
        #: Tables of nested scopes not visited yet, by (name, line): both walks have the same order.
        self._nested = _nested(table)
        #: Names bound by the comprehensions around the node that have no table (see `_enter`).
        self._bound: frozenset[str] = frozenset()
        self.in_function = False

    def is_global(self, name: str) -> bool:
        """Whether ``name`` means the module's global at the node being visited."""
        if name in self._bound:
            return False
        try:
            symbol = self._table.lookup(name)
        except KeyError:  # not used here
            return False
        return symbol.is_global() or self._table.get_type() == "module"

    def is_bound_here(self, name: str) -> bool:
        """Whether ``name`` is bound in the scope of the node being visited, not around it."""
        if name in self._bound:
            return True
        try:
            symbol = self._table.lookup(name)
        except KeyError:
            return False
        return symbol.is_local()

    def entering_function(self, node: Function) -> None:
        """Called inside of the scope of ``node``, before its body is visited."""

    def leaving_function(self, node: Function) -> None:
        """Called inside of the scope of ``node``, after its body was visited."""

    def entering_class(self, node: ast.ClassDef) -> None:
        """Called inside of the scope of ``node``, before its body is visited."""

    def leaving_class(self, node: ast.ClassDef) -> None:
        """Called inside of the scope of ``node``, after its body was visited."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node, node.name)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node, node.name)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._function(node, "lambda")

    def _function(self, node: Function, name: str) -> ast.AST:
        if not isinstance(node, ast.Lambda):
            node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
            node.returns = node.returns and self.visit(node.returns)
        node.args = self.visit(node.args)
        outer = self._enter(name, node.lineno), self.in_function
        self.in_function = True
        self.entering_function(node)
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = [made for it in node.body for made in self._statements(it)]
        self.leaving_function(node)
        self._leave(outer[0])
        self.in_function = outer[1]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.bases = [self.visit(base) for base in node.bases]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        outer = self._enter(node.name, node.lineno), self.in_function
        # A class body runs where the class is created; the methods in it are functions again.
        self.in_function = False
        self.entering_class(node)
        node.body = [made for it in node.body for made in self._statements(it)]
        self.leaving_class(node)
        self._leave(outer[0])
        self.in_function = outer[1]
        return node

    def _statements(self, node: ast.stmt) -> list[ast.stmt]:
        made = self.visit(node)
        return made if isinstance(made, list) else [made]

    def generic_visit(self, node: ast.AST) -> ast.AST:
        name = _COMPREHENSIONS.get(type(node))  # type: ignore[call-overload]
        if name is None:
            return super().generic_visit(node)
        assert isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
        first = node.generators[0]
        first.iter = self.visit(first.iter)
        kept, first.iter = first.iter, ast.Constant(None)
        outer = self._enter(name, node.lineno, inlined=_bound_by(node))
        super().generic_visit(node)
        self._leave(outer)
        first.iter = kept
        return node

    def _enter(self, name: str, line: int, inlined: frozenset[str] = frozenset()) -> _Outer:
        """Enter a scope, and return the outer one for ``_leave``.

        Python 3.12 inlines comprehensions (PEP 709): they have no table of their own. The names
        that they use are in the table around them, and the names that they bind are ``inlined``.
        """
        outer = self._table, self._nested, self._bound
        if inlined and not self._nested.get((name, line)):
            self._bound |= inlined
        else:
            self._table = self._nested[name, line].pop(0)
            self._nested, self._bound = _nested(self._table), frozenset()
        return outer

    def _leave(self, outer: _Outer) -> None:
        self._table, self._nested, self._bound = outer


_Nested = dict[tuple[str, int], list[symtable.SymbolTable]]
_Outer = tuple[symtable.SymbolTable, _Nested, frozenset[str]]


def _bound_by(node: Comprehension) -> frozenset[str]:
    """Names that the loops of a comprehension bind; a walrus binds in the function around it."""
    return frozenset(
        it.id
        for loop in node.generators
        for it in ast.walk(loop.target)
        if isinstance(it, ast.Name) and isinstance(it.ctx, ast.Store)
    )


def _nested(table: symtable.SymbolTable) -> _Nested:
    found: _Nested = {}
    for child in table.get_children():
        found.setdefault((child.get_name(), child.get_lineno()), []).append(child)
    return found
