"""The value of a process-global at one moment: a form to compare and a text to print.

Objects are read without running their code, because lazy modules import themselves when an
attribute is read. Not seen: changes deeper than ``DEPTH``, inside other libraries' objects, or in a
``threading.local`` of other threads.
"""

from __future__ import annotations

import enum
import functools
import itertools
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_distguard.context import environment

#: How many levels of containers and of SGLang's own objects are compared.
DEPTH = 3
_ATOMS = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
#: Only rebinding these is seen; their contents are listed separately, or are code.
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_CACHE = type(functools.lru_cache(lambda: None))
_SEQUENCES = (list, tuple, deque)
_SETS = (set, frozenset)
_WEAK_MAPPINGS = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)
_WEAK = (*_WEAK_MAPPINGS, weakref.WeakSet)


@dataclass(frozen=True)
class Value:
    """A value as it was when it was read.

    Attributes:
        text: to print.
        print: equal for equal values, down to ``DEPTH`` levels.
        kept: keeps the objects alive whose identities are in ``print``, so that no later object can
            have the same identity.
        may_appear: whether it is no change when the value is new: it is imported code, or was not
            read before.
        was_asked: whether it is a cache that keeps, or kept, a result.
    """

    text: str
    print: Any
    kept: Any
    may_appear: bool
    was_asked: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.print == other.print

    def __hash__(self) -> int:
        return hash(self.text)


def value_of(thing: Any) -> Value:
    """The present value of ``thing``."""
    thing = _function_of(thing)
    kept: list[Any] = [thing]
    asked = is_cache(thing) and thing.cache_info().misses > 0
    return Value(_text(thing), _print(thing, DEPTH, kept), kept, isinstance(thing, _OPAQUE), asked)


def kind_of(thing: Any) -> str | None:
    """Return "cache", "container" or "object" if ``thing`` can change, else None."""
    thing = _function_of(thing)
    if is_cache(thing):
        return "cache"
    if is_container(thing):
        return "container"
    return "object" if is_object(thing) else None


def is_cache(thing: Any) -> bool:
    """Whether ``thing`` is a function that ``functools.lru_cache`` wraps."""
    return type(thing) is _CACHE


def is_container(thing: Any) -> bool:
    """Whether ``thing`` is a mutable container."""
    return isinstance(thing, (dict, list, set, deque, bytearray, *_WEAK))


def is_object(thing: Any) -> bool:
    """Whether ``thing`` is an instance of an SGLang class and has instance attributes."""
    if isinstance(thing, (*_OPAQUE, *_ATOMS)) or not _module(thing).startswith("sglang."):
        return False
    return bool(attributes(thing)) or any(True for _ in _slots(thing))


def attributes(thing: Any) -> dict[str, Any]:
    """The instance attributes of ``thing``, read without running its code."""
    if type(thing) is threading.local:  # a subclass's constructor runs on a thread's first access
        return vars(thing)
    found = {}
    for name, slot in _slots(thing):
        try:
            found[name] = slot.__get__(thing)
        except AttributeError:  # not set
            continue
    try:
        others = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return found
    if isinstance(others, dict):
        found.update((name, it) for name, it in list(others.items()) if not _is_a_hook(it))
    return found


def _is_a_hook(thing: Any) -> bool:
    """Whether it is the guard's (``environment.ask_scopes_first``), and no change by SGLang."""
    return isinstance(thing, functools.partial) and thing.func.__module__ == environment.__name__


def _slots(thing: Any) -> Iterator[tuple[str, types.MemberDescriptorType]]:
    for kind in type(thing).__mro__:
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType) and not name.startswith("__"):
                yield name, slot


def _function_of(thing: Any) -> Any:
    """The function of a class or static method; any other ``thing`` as it is."""
    return thing.__func__ if isinstance(thing, (classmethod, staticmethod)) else thing


def _print(thing: Any, depth: int, kept: list[Any]) -> Any:
    if isinstance(thing, _ATOMS):
        return type(thing), repr(thing) if isinstance(thing, float) else thing
    if is_cache(thing):
        info = thing.cache_info()
        return id(thing), info.misses, info.currsize
    if isinstance(thing, (bytearray, itertools.count)):
        return id(thing), repr(thing)
    if isinstance(thing, types.FunctionType) and depth > 0 and vars(thing):
        kept.append(thing)
        return id(thing), _print(vars(thing), depth - 1, kept)
    if isinstance(thing, _OPAQUE) or depth == 0:
        kept.append(thing)
        return id(thing)
    if isinstance(thing, _WEAK_MAPPINGS):
        items = dict(thing)
        return id(thing), _print(list(items.items()), depth, kept)[1]
    if isinstance(thing, weakref.WeakSet):
        return id(thing), _print(set(thing), depth, kept)[1]
    version = _version(thing)
    if version is not None:
        kept.append(thing)
        return id(thing), version
    if isinstance(thing, dict):
        items = [
            (_print(key, 0, kept), _print(value, depth - 1, kept))
            for key, value in list(dict.items(thing))
        ]
        return _identity(thing), tuple(items)
    if isinstance(thing, _SEQUENCES):
        return _identity(thing), tuple(_print(item, depth - 1, kept) for item in tuple(thing))
    if isinstance(thing, _SETS):
        return _identity(thing), frozenset(_print(item, 0, kept) for item in tuple(thing))
    kept.append(thing)
    if not is_object(thing) and type(thing) is not threading.local:
        return id(thing)
    inside = attributes(thing)
    return id(thing), tuple(
        (name, _print(value, depth - 1, kept)) for name, value in list(inside.items())
    )


def _version(thing: Any) -> int | None:
    """How often a tensor was written; None for anything else, and where torch does not count."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    if not issubclass(type(thing), tensor):
        return None
    try:
        return int(thing._version)
    except RuntimeError:  # a tensor of inference mode has no version
        return None


def _identity(thing: Any) -> Any:
    # Equal tuples and frozensets are interchangeable; one of two equal lists may be changed.
    return type(thing) if isinstance(thing, (tuple, frozenset)) else id(thing)


def _text(thing: Any) -> str:
    if isinstance(thing, _ATOMS):
        text = repr(thing)
        return text if len(text) <= 60 else text[:59] + "…"
    if is_cache(thing):
        return f"cache of {thing.cache_info().currsize}"
    if isinstance(thing, (dict, *_SEQUENCES, *_SETS, *_WEAK, bytearray)):
        return f"{_name(thing)} of {len(thing)}"
    if isinstance(thing, _OPAQUE):
        return f"{_name(thing)} {getattr(thing, '__qualname__', getattr(thing, '__name__', ''))}"
    return _name(thing)


def _name(thing: Any) -> str:
    return type(thing).__name__


def _module(thing: Any) -> str:
    return str(getattr(type(thing), "__module__", ""))
