"""What SGLang's text says: which module globals and class attributes functions write, and where."""

from __future__ import annotations

import ast
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Methods by which a container changes.
_CHANGES = frozenset(
    [
        "add",
        "append",
        "appendleft",
        "clear",
        "discard",
        "extend",
        "extendleft",
        "insert",
        "move_to_end",
        "pop",
        "popitem",
        "popleft",
        "remove",
        "reverse",
        "rotate",
        "setdefault",
        "sort",
        "update",
    ]
)
#: Methods that return what is inside of a container.
_INSIDE = frozenset(["get", "setdefault"])
#: 0.5.23: writes of an environment variable through a field of ``envs``.
_FIELDS = ("sglang.srt.environ", "envs", frozenset(["set", "override", "clear"]))
#: Bare name -> (module, name) it was imported from; name "" for a module.
_Names = dict[str, tuple[str, str]]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
#: Stands for the module that is read where ``globals()`` is.
_MODULE = "globals()"
_WRITING = frozenset(
    [
        *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete, ast.NamedExpr, ast.Call),
        *(ast.For, ast.AsyncFor, ast.With, ast.AsyncWith),
    ]
)


@dataclass(frozen=True, order=True)
class Write:
    """A line of a function that writes a module global or a class attribute.

    Attributes:
        module: of the global.
        name: of the global; "Class.attribute" for a class's.
        file: module in whose text the line is.
        line: its number.
        function: qualified name of the function.
        rebinds: whether it is bound anew; else what it refers to is changed.
    """

    module: str
    name: str
    file: str
    line: int
    function: str
    rebinds: bool


@dataclass
class _Scope:
    """A function: what its bare names mean."""

    name: str
    local: set[str] = field(default_factory=set)
    declared: set[str] = field(default_factory=set)
    imported: _Names = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What the text of a module says.

    Attributes:
        writes: every write of a global that its functions make, as far as names tell. What is
            passed around, or written under a computed name, is not found: such changes show when
            they happen (``observe``). Environment variables are: ``environ[name]``.
        declared: every name in a ``global`` statement.
    """

    writes: tuple[Write, ...]
    declared: frozenset[str]


@functools.cache
def source_of(module: str, file: str) -> Source:
    """What the text of ``module`` in ``file`` says, which stays as it is."""
    text = Path(file).read_text(encoding="utf-8")
    collects = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no garbage: collecting takes longer than parsing
    try:
        return read(module, text)
    finally:
        if collects:
            gc.enable()


def read(module: str, text: str) -> Source:
    """What ``text`` says when it is ``module``'s."""
    tree = ast.parse(text)
    nodes = ast.walk(tree) if "global " in text else ()
    declared = frozenset(
        name for node in nodes if isinstance(node, ast.Global) for name in node.names
    )
    return Source(tuple(sorted(set(_Reader(module).read(tree)))), declared)


class _Reader:
    def __init__(self, module: str) -> None:
        self._module = module
        self._imported: _Names = {}
        self._bound: set[str] = set()
        self._classes: set[str] = set()
        #: Class -> what its body makes and no method gives an instance of its own.
        self._shared: dict[str, set[str]] = {}

    def read(self, tree: ast.Module) -> Iterator[Write]:
        self._shared = dict(_shared_attributes(tree, []))
        for node in tree.body:
            self._note(node)
        yield from self._visit(tree, [], [])

    def _note(self, node: ast.stmt) -> None:
        """What the module's own names are."""
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
        self._bound |= set(_bound_names(node))

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
        for target, rebinds in _targets(node):
            found = self._meaning(target, functions, classes, rebinds)
            if found is not None:
                line = getattr(node, "lineno", 0)
                yield Write(*found, self._module, line, functions[-1].name, rebinds)

    def _meaning(
        self, target: ast.expr, functions: list[_Scope], classes: list[str], rebinds: bool
    ) -> tuple[str, str] | None:
        """The global that ``target`` is; None when it is none, or nobody can tell."""
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
        first, attributes = _chain(target)
        if not attributes:
            return None
        if first == _MODULE:
            return self._module, attributes[0]
        if first == "cls" and classes:
            return self._module, ".".join([*classes, *attributes])
        if first == "self":
            return self._of_instance(classes, attributes, rebinds)
        owner = self._import_of(first, functions)
        if owner is not None and owner == _FIELDS[:2]:
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
        """The attribute of the class that every instance changes, if it is one."""
        name = ".".join(classes)
        if (rebinds and len(attributes) == 1) or attributes[0] not in self._shared.get(name, ()):
            return None
        return self._module, f"{name}.{attributes[0]}"

    def _import_of(self, name: str, functions: list[_Scope]) -> tuple[str, str] | None:
        """What the bare ``name`` was imported from, if it was."""
        for scope in reversed(functions):
            if name in scope.local:
                return scope.imported.get(name)
        return self._imported.get(name)


def _shared_attributes(node: ast.AST, path: list[str]) -> Iterator[tuple[str, set[str]]]:
    """(class, names that its body binds to something, and no method binds on the instance)"""
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
            for name in _bound_names(statement)
        }
        bound -= {
            target.attr
            for statement in ast.walk(child)
            for target, rebinds in _targets(statement)
            if rebinds and isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
        }
        yield ".".join(inner), bound
        yield from _shared_attributes(child, inner)


def _is_field(statement: ast.AnnAssign, owner: ast.ClassDef) -> bool:
    """Whether it declares what every instance has for itself: of a dataclass, a msgspec Struct."""
    made = [ast.unparse(it) for it in (*owner.decorator_list, *owner.bases)]
    declares = any("dataclass" in it or it.endswith(("Struct", "BaseModel")) for it in made)
    value = statement.value
    return declares or (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"))


def _imports(node: ast.Import | ast.ImportFrom) -> _Names:
    """What the names mean that it binds; relative imports are left out (SGLang 0.5.23 has none)."""
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


def _chain(target: ast.expr) -> tuple[str, list[str]]:
    """``a.b.c`` as ("a", ["b", "c"]); ("", []) when it does not begin with a name."""
    attributes: list[str] = []
    while isinstance(target, ast.Attribute):
        attributes.insert(0, target.attr)
        target = target.value
    if _is_call_of(target, "type"):
        return "cls", attributes
    if not isinstance(target, ast.Name):
        return "", []
    if target.id == "self" and attributes[:1] == ["__class__"]:
        return "cls", attributes[1:]
    return target.id, attributes


def _of_import(module: str, name: str, attributes: list[str]) -> tuple[str, str]:
    """(module, name) of an attribute of something imported: a class begins with a capital letter."""
    parts = [*module.split("."), *filter(None, [name]), *attributes]
    first = len(module.split("."))
    while first < len(parts) - 1 and not parts[first].lstrip("_")[:1].isupper():
        first += 1
    return ".".join(parts[:first]), ".".join(parts[first:])


def _targets(node: ast.AST) -> Iterator[tuple[ast.expr, bool]]:
    """(what is written, whether it is bound anew)"""
    if type(node) not in _WRITING:  # as most nodes
        return
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target] if getattr(node, "value", None) is not None else []
    elif isinstance(node, ast.Delete):
        targets = node.targets
    elif isinstance(node, (ast.For, ast.AsyncFor)):
        targets = [node.target]
    elif isinstance(node, (ast.With, ast.AsyncWith)):
        targets = [item.optional_vars for item in node.items if item.optional_vars]
    elif isinstance(node, ast.NamedExpr):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield from _changed_by(node, node.func)
        return
    elif (attribute := _set_attribute(node)) is not None:
        yield attribute, True
        return
    else:
        return
    for target in targets:
        for part in _parts(target):
            if isinstance(part, ast.Subscript):
                named = _variable(part.value, part.slice) or _of_globals(part)
                yield (named, True) if named is not None else (_container(part), False)
            elif isinstance(part, (ast.Name, ast.Attribute)):
                container = _container(part)
                yield container, container is part


def _changed_by(call: ast.Call, method: ast.Attribute) -> Iterator[tuple[ast.expr, bool]]:
    """What a call of ``method`` writes."""
    called_on = method.value
    if method.attr in _CHANGES:
        variable = _variable(called_on, call.args[0]) if call.args else None
        if variable is not None:
            yield variable, True
            return
    first, attributes = _chain(called_on)
    if first == _FIELDS[1] and len(attributes) == 1 and attributes[0].isupper():
        if method.attr in _FIELDS[2]:
            yield called_on, True
    elif method.attr in _CHANGES:
        yield _container(called_on), False


def _container(written: ast.expr) -> ast.expr:
    """``written`` itself, or what it is inside of: ``a.b`` of ``a.b[1].c``, ``a`` of ``a.get(1)``."""
    found, node = written, written
    while True:
        if isinstance(node, ast.Subscript):
            found = node = node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in _INSIDE
        ):
            found = node = node.func.value
        elif isinstance(node, ast.Attribute):
            node = node.value
        else:
            return found


def _variable(container: ast.expr, name: ast.expr) -> ast.expr | None:
    """``os.environ["NAME"]``: an environment variable is a global of its own, also ``[name]``."""
    if ast.unparse(container) == "os.environ":
        return ast.Attribute(ast.Name("os"), f"environ[{ast.unparse(name)}]", ast.Store())
    return None


def _of_globals(part: ast.Subscript) -> ast.expr | None:
    """``globals()["name"]``, as an attribute of the module that is read."""
    if _is_call_of(part.value, "globals") and isinstance(part.slice, ast.Constant):
        return ast.Attribute(ast.Name(_MODULE), str(part.slice.value), ast.Store())
    return None


def _is_call_of(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _set_attribute(node: ast.AST) -> ast.Attribute | None:
    """The attribute that ``setattr`` or ``delattr`` writes, if its name stands there."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"setattr", "delattr"}
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
    ):
        return ast.Attribute(node.args[0], str(node.args[1].value), ast.Store())
    return None


def _parts(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for element in target.elts:
            yield from _parts(element)
    elif isinstance(target, ast.Starred):
        yield from _parts(target.value)
    else:
        yield target


def _scope_of(function: ast.AST, name: str) -> _Scope:
    scope = _Scope(name)
    arguments = getattr(function, "args", None)
    if isinstance(arguments, ast.arguments):
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        scope.local |= {it.arg for it in every}
        scope.local |= {it.arg for it in (arguments.vararg, arguments.kwarg) if it is not None}
    for node in _own_nodes(function):
        if isinstance(node, ast.Global):
            scope.declared |= set(node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            scope.imported |= _imports(node)
        scope.local |= set(_bound_names(node))
    return scope


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions and classes inside of it."""
    pending = list(ast.iter_child_nodes(function))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            pending.extend(ast.iter_child_nodes(node))


def _bound_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    for target, rebinds in _targets(node):
        if rebinds and isinstance(target, ast.Name):
            yield target.id
