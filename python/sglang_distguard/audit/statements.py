"""Finds what one statement or call writes: a name, an attribute, or the contents of one."""

from __future__ import annotations

import ast
from collections.abc import Iterator

#: Methods that change a container.
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
#: Methods that return an element of a container.
_INSIDE = frozenset(["get", "setdefault"])
#: Functions that write an attribute of their first argument; the second argument names it.
_SETTERS = frozenset(
    ["setattr", "delattr", "force_setattr"]
)  # the last is msgspec's, for frozen structs
_OBJECTS_SETTERS = frozenset(["__setattr__", "__delattr__"])
#: 0.5.23: writes of an environment variable through a field of ``envs``.
FIELDS = ("sglang.srt.environ", "envs", frozenset(["set", "override", "clear"]))
#: Stands for the analysed module in the place of ``globals()`` and ``sys.modules[__name__]``.
MODULE = "globals()"
_WRITING = frozenset(
    [
        *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete, ast.NamedExpr, ast.Call),
        *(ast.For, ast.AsyncFor, ast.With, ast.AsyncWith),
    ]
)


def written_by(node: ast.AST) -> Iterator[tuple[ast.expr, bool]]:
    """Yield (what is written, whether it is rebound)."""
    if type(node) not in _WRITING:  # true of most nodes
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
    elif isinstance(node, ast.Call):
        if (attribute := _set_attribute(node)) is not None:
            yield attribute, True
        elif isinstance(node.func, ast.Attribute):
            yield from _changed_by(node, node.func)
        return
    else:
        return
    for target in targets:
        for part in _parts(target):
            if isinstance(part, ast.Subscript):
                named = _variable(part.value, part.slice) or _of_namespace(part)
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
    first, attributes = chain(called_on)
    if first == FIELDS[1] and len(attributes) == 1 and attributes[0].isupper():
        if method.attr in FIELDS[2]:
            yield called_on, True
    elif method.attr in _CHANGES:
        owner = _owner_of(called_on)
        if owner is not None:
            yield ast.Attribute(owner, f"[{method.attr}]", ast.Store()), True
        else:
            yield _container(called_on), False


def _container(written: ast.expr) -> ast.expr:
    """``written`` itself or its container: ``a.b`` for ``a.b[1].c``, ``a`` for ``a.get(1)``."""
    found, node = written, written
    while True:
        if _is_own_module(node):
            return found
        if isinstance(node, ast.Subscript):
            named = _of_namespace(node)
            if named is not None:
                return named
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
    """``os.environ["NAME"]`` or ``[name]``: each environment variable is a separate global."""
    if ast.unparse(container) == "os.environ":
        return ast.Attribute(ast.Name("os"), f"environ[{ast.unparse(name)}]", ast.Store())
    return None


def _of_namespace(part: ast.Subscript) -> ast.expr | None:
    """``globals()["name"]``, ``vars(x)["name"]`` or ``x.__dict__["name"]`` as an attribute."""
    owner = _owner_of(part.value)
    return None if owner is None else ast.Attribute(owner, _named(part.slice), ast.Store())


def _owner_of(namespace: ast.expr) -> ast.expr | None:
    """The module, class or object of ``globals()``, ``vars(x)`` or ``x.__dict__``."""
    if _is_call_of(namespace, "globals"):
        return ast.Name(MODULE)
    if isinstance(namespace, ast.Call) and is_name(namespace.func, "vars") and namespace.args:
        return namespace.args[0]
    if isinstance(namespace, ast.Attribute) and namespace.attr == "__dict__":
        return namespace.value
    return None


def _named(name: ast.expr) -> str:
    """The name of an attribute; a computed one is its expression in brackets."""
    return str(name.value) if isinstance(name, ast.Constant) else f"[{ast.unparse(name)}]"


def is_name(node: ast.expr, name: str) -> bool:
    """Whether ``node`` is this bare name."""
    return isinstance(node, ast.Name) and node.id == name


def _is_call_of(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and is_name(node.func, name)


def _is_own_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node) == "sys.modules[__name__]"


def _set_attribute(call: ast.Call) -> ast.Attribute | None:
    """The attribute that ``setattr`` or a similar call writes."""
    function = call.func
    if isinstance(function, ast.Name):
        sets = function.id in _SETTERS
    elif isinstance(function, ast.Attribute):
        sets = function.attr in _SETTERS or (
            function.attr in _OBJECTS_SETTERS and is_name(function.value, "object")
        )
    else:
        return None
    if sets and len(call.args) >= 2:
        return ast.Attribute(call.args[0], _named(call.args[1]), ast.Store())
    return None


def _parts(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for element in target.elts:
            yield from _parts(element)
    elif isinstance(target, ast.Starred):
        yield from _parts(target.value)
    else:
        yield target


def chain(target: ast.expr) -> tuple[str, list[str]]:
    """``a.b.c`` as ("a", ["b", "c"]); ("", []) when it does not begin with a name."""
    attributes: list[str] = []
    while isinstance(target, ast.Attribute):
        attributes.insert(0, target.attr)
        target = target.value
    if _is_call_of(target, "type"):
        return "cls", attributes
    if _is_own_module(target):
        return MODULE, attributes
    if not isinstance(target, ast.Name):
        return "", []
    if target.id == "self" and attributes[:1] == ["__class__"]:
        return "cls", attributes[1:]
    return target.id, attributes


def aliases(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield (bare name, container) of names that ``node`` binds to a container or its element."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        pairs = [(node.targets[0], node.value)]
    elif isinstance(node, ast.NamedExpr):
        pairs = [(node.target, node.value)]
    elif isinstance(node, (ast.For, ast.AsyncFor)):
        iterated = node.iter
        if (
            isinstance(iterated, ast.Call)
            and isinstance(iterated.func, ast.Attribute)
            and iterated.func.attr in ("items", "values")
        ):
            iterated = iterated.func.value
        pairs = [(part, iterated) for part in _parts(node.target)]
    else:
        return
    for target, value in pairs:
        container = _container(value)
        if isinstance(target, ast.Name) and isinstance(container, (ast.Name, ast.Attribute)):
            yield target.id, container


def bound_names(node: ast.AST) -> Iterator[str]:
    """The bare names that ``node`` binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    for target, rebinds in written_by(node):
        if rebinds and isinstance(target, ast.Name):
            yield target.id
