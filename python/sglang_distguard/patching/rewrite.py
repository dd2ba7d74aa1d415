"""Recompiles a module's functions so that chosen module globals are read through an accessor.

`X` becomes `_distguard_scoped_X.value` wherever a function means the module global `X`; attributes of
classes and of other modules, `C.X` and `m.X`, are `elsewhere`'s. Nothing but the accessor differs: same
file, same lines, same constants. Works on source text alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType

from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.elsewhere import Elsewhere
from sglang_distguard.patching.source import ModuleSource
from sglang_distguard.patching.syntax import (
    COMPREHENSIONS,
    NAMED,
    Function,
    accessor_name,
    bound_names,
    own_nodes,
    owned,
)


@dataclass(frozen=True)
class Rewrite:
    """What to change in one module.

    Attributes:
        replaced: code as SGLang compiled it -> the same code with accessors.
        initials: global -> code of an expression that makes a fresh scope's first value: the one
            the module itself assigns to it at import.
    """

    replaced: dict[CodeType, CodeType]
    initials: dict[str, CodeType]


@cache
def rewrite(
    source: ModuleSource,
    names: frozenset[str],
    elsewhere: frozenset[tuple[str, str]] = frozenset(),
) -> Rewrite:
    """Plan the rewriting of ``names`` in ``source``, and of the attributes that are ``elsewhere``.

    Args:
        source: of the module.
        names: its own globals; "Class.attribute" for a class's.
        elsewhere: (owner, attribute); the owner is another module, or "module.Class".

    Raises:
        NotSupported: a name is not assigned exactly once at the level of its module or class, a
            function binds it in a way that has no attribute form (an import, a def, an except
            clause), or an attribute is copied where no scope is in force, at import.
    """
    tree = ast.parse(source.text, source.filename)
    initials = _initial_values(source, tree, names)
    changed = ast.parse(source.text, source.filename)
    attributes = {owned(source.module, name) for name in names if "." in name}
    if elsewhere or attributes:
        changed = Elsewhere(source, elsewhere | attributes).visit(changed)
    changed = _Accessors(source, names).visit(changed)
    ast.fix_missing_locations(changed)
    replaced = dict(_changed_code(_compile(tree, source), _compile(changed, source)))
    return Rewrite(replaced, initials)


def _compile(tree: ast.AST, source: ModuleSource, mode: str = "exec") -> CodeType:
    try:
        return compile(tree, source.filename, mode, dont_inherit=True)  # type: ignore[arg-type]
    except (TypeError, ValueError, SyntaxError) as error:
        raise NotSupported(
            f"{source.module} cannot be rewritten: {error}", module=source.module
        ) from error


def _nested(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _changed_code(before: CodeType, after: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Pair the nested code objects of two compilations of the same source, where they differ.

    The rewriting adds and removes no code object, so position alone pairs them.
    """
    for old, new in zip(_nested(before), _nested(after), strict=True):
        if old != new:
            yield old, new
        yield from _changed_code(old, new)


def _initial_values(
    source: ModuleSource, tree: ast.Module, names: frozenset[str]
) -> dict[str, CodeType]:
    found: dict[str, list[ast.expr]] = {name: [] for name in names}
    for name, value in _assigned(tree.body, ""):
        if name in names:
            found[name].append(value)
    for name, values in found.items():
        if len(values) != 1:
            level = "class" if "." in name else "module"
            raise NotSupported(
                f"{source.module}.{name} is assigned {len(values)} times at {level} level, not once",
                module=source.module,
            )
    initials = {}
    for name, (value,) in found.items():
        # Inside a lambda, so that globals it reads are this scope's own too
        # (runtime_context: `_CONTEXT = RuntimeContext(parallel=_PARALLEL)`).
        thunk = ast.Lambda(args=_no_arguments(), body=value)
        expression = ast.Expression(_Accessors(source, names).visit(thunk))
        initials[name] = _compile(ast.fix_missing_locations(expression), source, "eval")
    return initials


def _assigned(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of what a module and the classes in it assign."""
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from _assigned(statement.body, f"{prefix}{statement.name}.")
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            single = isinstance(statement, ast.AnnAssign)
            for target in [statement.target] if single else statement.targets:
                if isinstance(target, ast.Name):
                    yield prefix + target.id, statement.value


def _no_arguments() -> ast.arguments:
    return ast.arguments(
        posonlyargs=[], args=[], vararg=None, kwonlyargs=[], kw_defaults=[], kwarg=None, defaults=[]
    )


class _Accessors(ast.NodeTransformer):
    """Turns global `X` into `_distguard_scoped_X.value` inside functions.

    Code at module and class level runs once, at import, in the module's own namespace: it stays.
    `visible` holds the wanted names that still mean the module global at the node being visited.
    """

    def __init__(self, source: ModuleSource, names: frozenset[str]) -> None:
        self._source = source
        self._names = names
        self._visible = names
        self._in_function = False

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not self._in_function or node.id not in self._visible:
            return node
        accessor = ast.Name(id=accessor_name(node.id), ctx=ast.Load())
        attribute = ast.Attribute(value=accessor, attr="value", ctx=node.ctx)
        ast.copy_location(accessor, node)
        return ast.copy_location(attribute, node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._function(node)

    def _function(self, node: Function) -> ast.AST:
        # Decorators, defaults and annotations belong to the enclosing scope.
        if not isinstance(node, ast.Lambda):
            node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
            node.returns = node.returns and self.visit(node.returns)
        node.args = self.visit(node.args)
        outer = self._visible, self._in_function
        self._visible, self._in_function = self._still_global(node), True
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = [self.visit(statement) for statement in node.body]
        self._visible, self._in_function = outer
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # A class body binds attributes, not globals; the methods in it are functions again.
        outer, self._in_function = self._in_function, False
        self.generic_visit(node)
        self._in_function = outer
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, COMPREHENSIONS):
            return super().generic_visit(node)
        bound = {
            name.id
            for generator in node.generators
            for name in ast.walk(generator.target)
            if isinstance(name, ast.Name)
        }
        outer = self._visible
        self._visible = outer - bound
        super().generic_visit(node)
        self._visible = outer
        return node

    def _still_global(self, node: Function) -> frozenset[str]:
        declared = {
            name
            for child in own_nodes(node)
            if isinstance(child, ast.Global)
            for name in child.names
        }
        bound = bound_names(node)
        for child in own_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                imported = {(alias.asname or alias.name).split(".")[0] for alias in child.names}
                self._refuse(imported & declared, child)
                bound |= imported
            elif isinstance(child, NAMED) and child.name is not None:
                self._refuse({child.name} & declared, child)
                bound.add(child.name)
        return (self._visible - (bound - declared)) | (declared & self._names)

    def _refuse(self, names: set[str], node: ast.AST) -> None:
        for name in sorted(names & self._names):
            line = getattr(node, "lineno", 0)
            raise NotSupported(
                f"{self._source.module}, line {line}, binds the global {name!r} by "
                f"{type(node).__name__}, which cannot be redirected to a scope",
                module=self._source.module,
            )
