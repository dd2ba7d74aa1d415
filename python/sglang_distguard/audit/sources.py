"""Finds in SGLang's text which module globals and class attributes functions write, and where."""

from __future__ import annotations

import ast
import functools
import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path

from sglang_distguard.audit import statements
from sglang_distguard.audit.statements import (
    FIELDS,
    MODULE,
    aliases,
    bound_names,
    chain,
    is_name,
    written_by,
)
from sglang_distguard.patching.code_cache import digest_of, kept

#: Bare name -> (module, name) it was imported from; name "" for a module.
_Names = dict[str, tuple[str, str]]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True, order=True)
class Write:
    """A line of a function that writes a module global or a class attribute.

    Attributes:
        module: of the global.
        name: of the global; "Class.attribute" for a class's.
        file: module that contains the line.
        line: its number.
        function: qualified name of the function.
        rebinds: whether the line rebinds the global; else it changes the object behind it.
    """

    module: str
    name: str
    file: str
    line: int
    function: str
    rebinds: bool


@dataclass
class _Scope:
    """The meaning of the bare names in a function."""

    name: str
    owner: str = ""  # of a class method: the name of its first parameter, which is the class
    local: set[str] = field(default_factory=set)
    declared: set[str] = field(default_factory=set)
    imported: _Names = field(default_factory=dict)
    #: Local name -> the containers that it is another name of, or of an element of.
    aliases: dict[str, list[ast.expr]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The writes and declarations in the text of a module.

    Attributes:
        writes: every write of a global in its functions, as far as names show, also through a local
            name for it or for one of its elements. Writes to objects that are passed around are not
            found; such changes show when they happen (``observe``). Under a computed name the name
            is an expression: ``environ[name]``, ``Class.[name]``.
        declared: every name in a ``global`` statement.
        moments: first lines of what may restore a value: a ``finally`` clause, an ``__exit__``, a
            generator that is a context manager, after its ``yield``.
    """

    writes: tuple[Write, ...]
    declared: frozenset[str]
    moments: frozenset[int] = frozenset()


@functools.cache
def source_of(module: str, file: str) -> Source:
    """Read the text of ``module`` in ``file``, which must not change afterwards.

    Half a minute for all of SGLang 0.5.23, so what was found is kept for later processes.
    """
    text = Path(file).read_text(encoding="utf-8")

    def found() -> tuple[object, ...]:
        with uncollected():
            source = read(module, text)
        return tuple(map(astuple, source.writes)), source.declared, source.moments

    writes, declared, moments = kept(("source", _reader(), module, text), found)
    return Source(tuple(Write(*it) for it in writes), declared, moments)


@functools.cache
def _reader() -> str:
    """Digest of the code that reads: what another version of it found is not used."""
    return digest_of([Path(__file__), Path(statements.__file__)])


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection for work that makes many objects and no garbage.

    A collection would take longer than the work.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def read(module: str, text: str) -> Source:
    """Read ``text`` as the text of ``module``."""
    tree = ast.parse(text)
    nodes = ast.walk(tree) if "global " in text else ()
    declared = frozenset(
        name for node in nodes if isinstance(node, ast.Global) for name in node.names
    )
    writes = tuple(sorted(set(_Reader(module).read(tree))))
    return Source(writes, declared, frozenset(_moments(tree)))


def _moments(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and node.finalbody:
            yield node.finalbody[0].lineno
        elif isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(it) for it in node.decorator_list]
            if node.name == "__exit__":
                yield node.body[0].lineno
            elif any(it.endswith("contextmanager") for it in decorators):
                yield from _after_yields(node.body)


def _after_yields(body: list[ast.stmt]) -> Iterator[int]:
    """The lines of the statements that follow a statement with a ``yield`` in it."""
    for statement, following in itertools.pairwise(body):
        if any(isinstance(it, (ast.Yield, ast.YieldFrom)) for it in ast.walk(statement)):
            yield following.lineno
    for statement in body:
        for name in ("body", "orelse", "finalbody"):
            yield from _after_yields(getattr(statement, name, []))


class _Reader:
    def __init__(self, module: str) -> None:
        self._module = module
        self._imported: _Names = {}
        self._bound: set[str] = set()
        self._classes: set[str] = set()
        #: Class -> attributes that its body binds and no method binds on the instance.
        self._shared: dict[str, set[str]] = {}

    def read(self, tree: ast.Module) -> Iterator[Write]:
        self._shared = dict(_shared_attributes(tree, []))
        for node in tree.body:
            self._note(node)
        yield from self._visit(tree, [], [])

    def _note(self, node: ast.stmt) -> None:
        """Record the module's own names."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._imported |= _imports(node)
        elif isinstance(node, ast.ClassDef):
            self._classes.add(node.name)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self._note(child)
                elif isinstance(child, ast.ExceptHandler):
                    for statement in child.body:
                        self._note(statement)
        self._bound |= set(bound_names(node))

    def _visit(self, node: ast.AST, functions: list[_Scope], classes: list[str]) -> Iterator[Write]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _FUNCTIONS):
                name = getattr(child, "name", "<lambda>")
                scope = _scope_of(child, ".".join([*classes, name]))
                yield from self._visit(child, [*functions, scope], classes)
            elif isinstance(child, ast.ClassDef):
                yield from self._visit(child, functions, [*classes, child.name])
            else:
                if functions:
                    yield from self._writes_of(child, functions, classes)
                yield from self._visit(child, functions, classes)

    def _writes_of(
        self, node: ast.AST, functions: list[_Scope], classes: list[str]
    ) -> Iterator[Write]:
        line = getattr(node, "lineno", 0)
        for target, rebinds in written_by(node):
            found = self._meaning(target, functions, classes, rebinds)
            if found is not None:
                yield Write(*found, self._module, line, functions[-1].name, rebinds)
                continue
            if isinstance(target, ast.Name) and rebinds:
                continue
            for other in _other_names(target, functions):
                found = self._meaning(other, functions, classes, rebinds=False)
                if found is not None:
                    yield Write(*found, self._module, line, functions[-1].name, rebinds=False)

    def _meaning(
        self, target: ast.expr, functions: list[_Scope], classes: list[str], rebinds: bool
    ) -> tuple[str, str] | None:
        """The global that ``target`` denotes; None if it denotes none or this is unknown."""
        if isinstance(target, ast.Name):
            if target.id in functions[-1].declared:
                return self._module, target.id
            if rebinds:
                return None
            owner = self._import_of(target.id, functions)
            if owner is not None:
                return owner if owner[1] else None
            if any(target.id in it.local - it.declared for it in functions):
                return None
            return (self._module, target.id) if target.id in self._bound else None
        first, attributes = chain(target)
        if not attributes:
            return None
        if first == MODULE:
            return self._module, attributes[0]
        if classes and (first == "cls" or _is_owner(first, functions)):
            return self._module, ".".join([*classes, *attributes])
        if first == "self":
            return self._of_instance(classes, attributes, rebinds)
        owner = self._import_of(first, functions)
        if owner is not None and owner == FIELDS[:2]:
            return owner[0], ".".join([owner[1], *attributes])
        if owner is not None:
            return _of_import(*owner, attributes)
        if any(first in it.local - it.declared for it in functions):
            return None
        if first in self._classes:
            return self._module, ".".join([first, *attributes])
        return (self._module, first) if first in self._bound else None

    def _of_instance(
        self, classes: list[str], attributes: list[str], rebinds: bool
    ) -> tuple[str, str] | None:
        """The class attribute that is changed through an instance, or None."""
        name = ".".join(classes)
        if (rebinds and len(attributes) == 1) or attributes[0] not in self._shared.get(name, ()):
            return None
        return self._module, f"{name}.{attributes[0]}"

    def _import_of(self, name: str, functions: list[_Scope]) -> tuple[str, str] | None:
        """The origin of the bare ``name`` if it was imported, else None."""
        for scope in reversed(functions):
            if name in scope.local:
                return scope.imported.get(name)
        return self._imported.get(name)


def _other_names(target: ast.expr, functions: list[_Scope]) -> Iterator[ast.expr]:
    """The containers that the local name at the beginning of ``target`` stands for."""
    first = target.id if isinstance(target, ast.Name) else chain(target)[0]
    for scope in reversed(functions):
        if first in scope.local:
            seen, pending = {first}, list(scope.aliases.get(first, ()))
            while pending:
                container = pending.pop()
                yield container
                if isinstance(container, ast.Name) and container.id not in seen:
                    seen.add(container.id)
                    pending += scope.aliases.get(container.id, ())
            return


def _is_owner(name: str, functions: list[_Scope]) -> bool:
    """Whether the bare ``name`` is the class parameter of a class method."""
    for scope in reversed(functions):
        if name in scope.local:
            return name == scope.owner
    return False


def _shared_attributes(node: ast.AST, path: list[str]) -> Iterator[tuple[str, set[str]]]:
    """Yield (class, names that its body binds and no method binds on the instance)."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef):
            if not isinstance(child, ast.expr):
                yield from _shared_attributes(child, path)
            continue
        inner = [*path, child.name]
        bound = {
            name
            for statement in child.body
            if isinstance(statement, ast.Assign)
            or (isinstance(statement, ast.AnnAssign) and not _is_field(statement, child))
            for name in bound_names(statement)
        }
        bound -= {
            target.attr
            for statement in ast.walk(child)
            for target, rebinds in written_by(statement)
            if rebinds and isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
        }
        yield ".".join(inner), bound
        yield from _shared_attributes(child, inner)


def _is_field(statement: ast.AnnAssign, owner: ast.ClassDef) -> bool:
    """Whether it declares a field of each instance, as in a dataclass or a msgspec Struct."""
    made = [ast.unparse(it) for it in (*owner.decorator_list, *owner.bases)]
    declares = any("dataclass" in it or it.endswith(("Struct", "BaseModel")) for it in made)
    value = statement.value
    return declares or (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"))


def _imports(node: ast.Import | ast.ImportFrom) -> _Names:
    """Origins of the names that it binds, except relative imports (SGLang 0.5.23 has none)."""
    if isinstance(node, ast.ImportFrom):
        if node.level or not node.module:
            return {}
        return {it.asname or it.name: (node.module, it.name) for it in node.names}
    return {
        it.asname or it.name.partition(".")[0]: (
            it.name if it.asname else it.name.partition(".")[0],
            "",
        )
        for it in node.names
    }


def _of_import(module: str, name: str, attributes: list[str]) -> tuple[str, str]:
    """(module, name) of an attribute of an import; a class begins with a capital letter."""
    parts = [*module.split("."), *filter(None, [name]), *attributes]
    first = len(module.split("."))
    while first < len(parts) - 1 and not parts[first].lstrip("_")[:1].isupper():
        first += 1
    return ".".join(parts[:first]), ".".join(parts[first:])


def _scope_of(function: ast.AST, name: str) -> _Scope:
    scope = _Scope(name)
    arguments = getattr(function, "args", None)
    if isinstance(arguments, ast.arguments):
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        scope.local |= {it.arg for it in every}
        scope.local |= {it.arg for it in (arguments.vararg, arguments.kwarg) if it is not None}
        decorators = getattr(function, "decorator_list", [])  # a lambda has none
        if every and any(is_name(it, "classmethod") for it in decorators):
            scope.owner = every[0].arg
    for node in _own_nodes(function):
        if isinstance(node, ast.Global):
            scope.declared |= set(node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            scope.imported |= _imports(node)
        scope.local |= set(bound_names(node))
        for alias, container in aliases(node):
            scope.aliases.setdefault(alias, []).append(container)
    return scope


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of nested functions and classes."""
    pending = list(ast.iter_child_nodes(function))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            pending.extend(ast.iter_child_nodes(node))
