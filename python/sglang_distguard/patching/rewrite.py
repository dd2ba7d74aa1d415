"""Recompile a module's functions so that they read chosen module globals through an accessor.

Where a function reads the module global `X`, it reads `_distguard_scoped_X.value` if
`_distguard_scopes_exist`, else `X`: the only runner of a process reads as in plain SGLang
(docs/COST.md). Writes always use the accessor. Attributes of classes and of other modules, `C.X` and
`m.X`, are rewritten by `foreign_reads`. Nothing else differs: same file, same lines, same constants.
The rewriting needs only source text.

Functions that make all their reads at once (`early_reads`) read through the accessor without asking,
because they get their own code back while no scope exists (`plan.read_directly`).
"""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Optional

from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.code_cache import kept
from sglang_distguard.patching.early_reads import are_early
from sglang_distguard.patching.foreign_reads import Elsewhere
from sglang_distguard.patching.source import ModuleSource
from sglang_distguard.patching.syntax import (
    SCOPES_EXIST,
    Function,
    ScopeTransformer,
    accessor_name,
    owned,
)
from sglang_distguard.patching.with_blocks import Block, Enclose


@dataclass(frozen=True)
class Rewrite:
    """The code to change in one module.

    Attributes:
        replaced: code as Python compiles SGLang's text -> the same code with accessors.
        initials: global -> code of the expression for its first value in a fresh scope: the
            expression that the module itself assigns to it at import.
        early: those keys of ``replaced`` which are right themselves while no scope exists.
    """

    replaced: dict[CodeType, CodeType]
    initials: dict[str, CodeType]
    early: frozenset[CodeType] = frozenset()


@cache
def rewrite(
    source: ModuleSource,
    names: frozenset[str],
    elsewhere: frozenset[tuple[str, str]] = frozenset(),
    blocks: frozenset[tuple[str, Block]] = frozenset(),
    flags: frozenset[str] = frozenset(),
) -> Rewrite:
    """Rewrite ``names``, and the attributes in ``elsewhere``, where ``source`` uses them.

    Args:
        source: source of the module.
        names: the module's own globals; "Class.attribute" for an attribute of a class.
        elsewhere: (owner, attribute) pairs; the owner is another module, or "module.Class".
        blocks: (qualified name, block) of functions whose bodies run in a with block.
        flags: those of ``names`` that have an accessor but no value in a scope.

    Raises:
        NotSupported: a name is not assigned exactly once at the level of its module or class; a
            function binds it in a way that has no attribute form (an import, a def, an except
            clause); or an attribute is copied at import, where no scope is in force.
    """
    made_from = (source.module, source.filename, source.text)
    wanted = (sorted(names), sorted(elsewhere), sorted(blocks), sorted(flags))
    replaced, initials, early = kept(
        (*made_from, *wanted), lambda: _rewritten(source, names, elsewhere, blocks, flags)
    )
    return Rewrite(dict(replaced), initials, early)


def _rewritten(
    source: ModuleSource,
    names: frozenset[str],
    elsewhere: frozenset[tuple[str, str]],
    blocks: frozenset[tuple[str, Block]],
    flags: frozenset[str],
) -> tuple[list[tuple[CodeType, CodeType]], dict[str, CodeType], frozenset[CodeType]]:
    """The fields of a ``Rewrite``, in a form that ``code_cache`` can store."""
    tree = ast.parse(source.text, source.filename)
    initials = _initial_values(source, tree, names)
    attributes = {owned(source.module, name) for name in names if "." in name}

    def changed(always: frozenset[str]) -> CodeType:
        tree = ast.parse(source.text, source.filename)
        if elsewhere or attributes:
            table = symtable.symtable(source.text, source.filename, "exec")
            tree = Elsewhere(source, elsewhere | attributes, table).visit(tree)
        table = symtable.symtable(source.text, source.filename, "exec")
        tree = _Accessors(source, names, always, table).visit(tree)
        if blocks:
            tree = Enclose(dict(blocks)).visit(tree)
        return _compile(ast.fix_missing_locations(tree), source)

    own = _compile(tree, source)
    replaced = dict(_changed_code(own, changed(flags)))
    others = flags | {name for _, name in elsewhere | attributes}
    fixed = frozenset(_classes_and_modules(tree)) - names
    enclosed = {qualname for qualname, _ in blocks}
    early = frozenset(
        it
        for it in nested(own)
        if it in replaced
        and it.co_qualname not in enclosed
        and are_early(it, names - flags, others, fixed)
    )
    if early:
        always = dict(_changed_code(own, changed(names)))
        replaced.update((it, always[it]) for it in early)
    return list(replaced.items()), initials, early


def _classes_and_modules(tree: ast.Module) -> Iterator[str]:
    """Names that the module itself binds by `class`, and by `import` of whole modules."""
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import):
            yield from (it.asname or it.name.partition(".")[0] for it in statement.names)


def _compile(tree: ast.AST, source: ModuleSource, mode: str = "exec") -> CodeType:
    try:
        return compile(tree, source.filename, mode, dont_inherit=True)  # type: ignore[arg-type]
    except (TypeError, ValueError, SyntaxError) as error:
        raise NotSupported(
            f"{source.module} cannot be rewritten: {error}", module=source.module
        ) from error


def nested(code: CodeType) -> list[CodeType]:
    """The code objects of the functions and classes directly inside ``code``."""
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def with_nested(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and all code objects nested in it."""
    yield code
    for inner in nested(code):
        yield from with_nested(inner)


def _changed_code(before: CodeType, after: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Pair the nested code objects of two compilations of the same source, where they differ.

    The rewriting adds and removes no code object, so position alone pairs them.
    """
    for old, new in zip(nested(before), nested(after), strict=True):
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
                f"{source.module}.{name} is assigned {len(values)} times at {level} level, not "
                "once",
                module=source.module,
            )
    initials = {}
    for name, (value,) in found.items():
        # Inside a lambda, so that the globals that it reads are those of the same scope
        # (runtime_context: `_CONTEXT = RuntimeContext(parallel=_PARALLEL)`).
        text = f"lambda: ({ast.unparse(value)})"
        thunk = ast.parse(text, source.filename, "eval")
        table = symtable.symtable(text, source.filename, "eval")
        expression = _Accessors(source, names, names, table).visit(thunk)
        initials[name] = _compile(ast.fix_missing_locations(expression), source, "eval")
    return initials


def _assigned(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield (name, value) of each assignment in a module and in its classes."""
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from _assigned(statement.body, f"{prefix}{statement.name}.")
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            single = isinstance(statement, ast.AnnAssign)
            for target in [statement.target] if single else statement.targets:
                if isinstance(target, ast.Name):
                    yield prefix + target.id, statement.value


class _Accessors(ScopeTransformer):
    """Turn global `X` into its accessor's value inside functions.

    Code at module and class level stays unchanged: it runs once, at import, in the module's own
    namespace.
    """

    def __init__(
        self,
        source: ModuleSource,
        names: frozenset[str],
        flags: frozenset[str],
        table: symtable.SymbolTable,
    ) -> None:
        super().__init__(table)
        self._source = source
        self._names = names
        #: Names that are always read through their accessors.
        self._flags = flags
        #: Whether the node is in a pattern of `match`, where Python allows only names with dots.
        self._in_pattern = False

    def _is_wanted(self, name: Optional[str]) -> bool:
        return (
            self.in_function and name is not None and name in self._names and self.is_global(name)
        )

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not self._is_wanted(node.id):
            return node
        accessor = ast.Name(id=accessor_name(node.id), ctx=ast.Load())
        attribute = ast.Attribute(value=accessor, attr="value", ctx=node.ctx)
        ast.copy_location(accessor, node)
        ast.copy_location(attribute, node)
        written = not isinstance(node.ctx, ast.Load)
        if written or self._in_pattern or node.id in self._flags:
            return attribute
        exist = ast.copy_location(ast.Name(id=SCOPES_EXIST, ctx=ast.Load()), node)
        return ast.copy_location(ast.IfExp(test=exist, body=attribute, orelse=node), node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in _bound_without_a_target(node):
            if self._is_wanted(name):
                self._refuse(name, node)
        outer = self._in_pattern
        self._in_pattern = isinstance(node, ast.pattern) or (outer and isinstance(node, ast.expr))
        visited = super().generic_visit(node)
        self._in_pattern = outer
        return visited

    def _function(self, node: Function, name: str) -> ast.AST:
        if self._is_wanted(name) and not isinstance(node, ast.Lambda):
            self._refuse(name, node)
        return super()._function(node, name)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if self._is_wanted(node.name):
            self._refuse(node.name, node)
        return super().visit_ClassDef(node)

    def _refuse(self, name: str, node: ast.AST) -> None:
        line = getattr(node, "lineno", 0)
        raise NotSupported(
            f"{self._source.module}, line {line}, binds the global {name!r} by "
            f"{type(node).__name__}, which cannot be redirected to a scope",
            module=self._source.module,
        )


def _bound_without_a_target(node: ast.AST) -> Iterator[str]:
    """Names that ``node`` binds in a way that has no attribute form."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
    elif isinstance(node, ast.NamedExpr):
        yield node.target.id
    elif isinstance(node, ast.MatchMapping):
        if node.rest is not None:
            yield node.rest
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        yield node.name
