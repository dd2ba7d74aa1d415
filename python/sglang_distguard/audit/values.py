"""The value of a process-global at one moment: a form to compare and a text to print.

A value has everything that the global holds, as far as ``graph`` reads objects: the contents of
containers and objects, of closures, default arguments and caches. ``DEPTH`` and ``OBJECTS`` bound
it, and the audit reports a value that holds more.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from typing import Any, NamedTuple

from sglang_distguard.audit.graph import CACHE, Node, Reader, attributes, is_a
from sglang_distguard.audit.libraries import is_listed

#: How many references away from its global an object is read.
DEPTH = 32
#: How many objects of one global are read.
OBJECTS = 10_000
_ATOMS = (bool, int, float, complex, str, bytes, type(None))
#: New ones are no change: they are code that was imported.
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_WRAPPERS = (classmethod, staticmethod)
_WEAK = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet)
_SIZED = (dict, list, tuple, deque, set, frozenset, bytearray, *_WEAK)
_MUTABLE = (dict, list, set, deque, bytearray, *_WEAK)


class Value:
    """A value as it was when it was read.

    Attributes:
        thing: what the global was bound to.
        form: equal for the same object, or for equal constants and tuples of them.
        states: identity -> state of each object that it holds.
        nodes: these objects in the order of their distance, each with the number of the one that
            refers to it and a label. They keep alive what ``form`` and ``states`` identify.
        may_appear: whether it is no change when the value is new: it is imported code, or was not
            read before.
        size: number of its elements, if it is a container or a cache.
        was_asked: whether it is a cache that keeps, or kept, a result.
        is_cut: whether it holds more than was read.
    """

    __slots__ = ("form", "is_cut", "may_appear", "nodes", "size", "states", "thing", "was_asked")

    def __init__(self, thing: Any, reader: Reader) -> None:
        root = Node(None)
        self.thing = thing
        self.form: Any = root.token(thing, "")
        self.nodes: list[tuple[Node, int, str]] = [(root, 0, "")]
        self.states: dict[int, Any] = _NOTHING
        self.is_cut = False
        if root.held and not is_a(thing, type):  # a class's attributes are globals themselves
            self.is_cut = _walk(self.nodes, reader)
            self.states = {id(node.thing): node.state for node, _, _ in self.nodes[1:]}
        traits = _traits(type(thing))
        self.size = len(thing) if traits.is_sized else 0
        self.may_appear = traits.is_code
        self.was_asked = False
        if traits.is_cache:
            info = thing.cache_info()
            self.size, self.was_asked = info.currsize, info.misses > 0

    @property
    def text(self) -> str:
        """To print."""
        thing = self.thing
        if is_a(thing, _ATOMS):
            text = repr(thing)
            return text if len(text) <= 60 else text[:59] + "…"
        traits = _traits(type(thing))
        name = "cache" if traits.is_cache else type(thing).__name__
        if traits.is_sized or traits.is_cache:
            return f"{name} of {self.size}"
        if traits.is_code:
            return f"{name} {getattr(thing, '__qualname__', getattr(thing, '__name__', ''))}"
        return name

    @property
    def kind(self) -> str | None:
        """The kind of global if it can change, else None.

        It is "cache", "container", "object", or "closure": a function or property that holds
        something that can change.
        """
        thing = self.thing
        if is_cache(thing):
            return "cache"
        if is_container(thing):
            return "container"
        if is_a(thing, (*_CODE, property)):
            held = (node.thing for node, _, _ in self.nodes[2:])
            return "closure" if any(map(_can_change, held)) else None
        return "object" if is_object(thing) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.form == other.form and self.states == other.states

    __hash__ = None  # type: ignore[assignment]


_NOTHING: dict[int, Any] = {}


class _Traits(NamedTuple):
    is_sized: bool
    is_code: bool
    is_cache: bool


@functools.cache
def _traits(kind: type) -> _Traits:
    return _Traits(issubclass(kind, _SIZED), issubclass(kind, _CODE), kind is CACHE)


def value_of(thing: Any, reader: Reader | None = None) -> Value:
    """The present value of ``thing``.

    Args:
        thing: what a global is bound to.
        reader: of the present moment; reads no object twice.
    """
    return Value(_function_of(thing), Reader() if reader is None else reader)


def _walk(nodes: list[tuple[Node, int, str]], reader: Reader) -> bool:
    """Append everything that the first node holds; return whether there is more."""
    seen: set[int] = set()
    begin, depth, is_cut = 0, 0, False
    while begin < len(nodes):
        end, depth = len(nodes), depth + 1
        for number in range(begin, end):
            for label, thing in nodes[number][0].held:
                if id(thing) in seen or (number and is_listed(thing)):
                    continue  # a registry that a function has for a default is a global itself
                if depth > DEPTH or len(nodes) > OBJECTS:
                    return True
                seen.add(id(thing))
                node = reader.node(thing)
                is_cut = is_cut or node.is_cut
                nodes.append((node, number, label))
        begin = end
    return is_cut


def texts(before: Value, after: Value) -> tuple[str, str]:
    """Describe the first difference between two values of one global."""
    if before.form != after.form:
        return before.text, after.text
    for value in (after, before):
        for node, number, label in value.nodes[1:]:
            key = id(node.thing)
            old, new = before.states.get(key), after.states.get(key)
            if old != new:
                path = _path(value.nodes, number, label)
                found = [_described(type(node.thing), it, path) for it in (old, new)]
                return found[0], found[1]
    return before.text, after.text


def _path(nodes: list[tuple[Node, int, str]], number: int, label: str) -> str:
    parts = [label]
    while number:
        _, number, label = nodes[number]
        parts.insert(0, label)
    return "".join(parts)


def _described(kind: type, state: Any, path: str) -> str:
    if state is None:
        told = "(nothing)"
    elif issubclass(kind, _SIZED) and kind is not bytearray:
        told = f"{kind.__name__} of {len(state if isinstance(state, frozenset) else state[0])}"
    elif kind is CACHE:
        told = f"cache of {state[1]}"
    else:
        told = kind.__name__
    return f"{path}: {told}" if path else told


def _can_change(thing: Any) -> bool:
    return is_cache(thing) or is_container(thing) or is_object(thing)


def is_cache(thing: Any) -> bool:
    """Whether ``thing`` is a function that ``functools.lru_cache`` wraps."""
    return type(thing) is CACHE


def is_container(thing: Any) -> bool:
    """Whether ``thing`` is a mutable container."""
    return is_a(thing, _MUTABLE)


def is_object(thing: Any) -> bool:
    """Whether ``thing`` is an instance of an SGLang class and has instance attributes."""
    if is_a(thing, (*_CODE, *_ATOMS)) or not _module(thing).startswith("sglang."):
        return False
    return bool(attributes(thing))


def _function_of(thing: Any) -> Any:
    """The function of a class or static method; any other ``thing`` as it is."""
    return thing.__func__ if is_a(thing, _WRAPPERS) else thing


def _module(thing: Any) -> str:
    return str(getattr(type(thing), "__module__", ""))
