"""A value of a process-global at one moment: what tells it from others, and a text for people.

Reads objects without running their code: lazy modules import themselves when an attribute is asked for.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import deque
from dataclasses import dataclass
from typing import Any

#: How deep into containers and into SGLang's own objects a change is seen.
DEPTH = 3
_ATOMS = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
#: Rebinding them is seen; what is inside of them is listed on its own, or is code.
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_CACHE = type(functools.lru_cache(lambda: None))
_SEQUENCES = (list, tuple, deque)
_SETS = (set, frozenset)


@dataclass(frozen=True)
class Value:
    """What was there.

    Attributes:
        text: for people.
        print: equal for equal values, as far as ``DEPTH`` goes.
        kept: what keeps the objects alive whose identities are in ``print``, so that no later
            object can be taken for one of them.
        may_appear: whether it is no change that it is there and was not before: code that was
            imported, or what nobody looked at yet.
    """

    text: str
    print: Any
    kept: Any
    may_appear: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.print == other.print

    def __hash__(self) -> int:
        return hash(self.text)


def value_of(thing: Any) -> Value:
    """``thing`` as it is now."""
    kept: list[Any] = [thing]
    return Value(_text(thing), _print(thing, DEPTH, kept), kept, isinstance(thing, _OPAQUE))


def kind_of(thing: Any) -> str | None:
    """ "cache", "container" or "object", if it is something that can change; else None."""
    if is_cache(thing):
        return "cache"
    if is_container(thing):
        return "container"
    return "object" if is_object(thing) else None


def is_cache(thing: Any) -> bool:
    """Whether it is a function with ``functools.lru_cache`` around it."""
    return type(thing) is _CACHE


def is_container(thing: Any) -> bool:
    """Whether it is a mutable container."""
    return isinstance(thing, (dict, list, set, deque, bytearray)) or _name(thing) in {
        "WeakValueDictionary",
        "WeakKeyDictionary",
        "WeakSet",
    }


def is_object(thing: Any) -> bool:
    """Whether it is an instance of a class of SGLang's that has attributes of its own."""
    if isinstance(thing, (*_OPAQUE, *_ATOMS)) or not _module(thing).startswith("sglang."):
        return False
    return bool(attributes(thing)) or any("__slots__" in vars(kind) for kind in type(thing).__mro__)


def attributes(thing: Any) -> dict[str, Any]:
    """Its own attributes, without running any code of its."""
    try:
        found = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def _print(thing: Any, depth: int, kept: list[Any]) -> Any:
    if isinstance(thing, _ATOMS):
        return type(thing), repr(thing) if isinstance(thing, float) else thing
    if is_cache(thing):
        return id(thing), thing.cache_info().currsize
    if isinstance(thing, _OPAQUE) or depth == 0:
        kept.append(thing)
        return id(thing)
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
    if not is_object(thing):
        return id(thing)
    inside = attributes(thing)
    return id(thing), tuple(
        (name, _print(value, depth - 1, kept)) for name, value in list(inside.items())
    )


def _identity(thing: Any) -> Any:
    # Equal tuples and frozensets are interchangeable; one of two equal lists may be changed.
    return type(thing) if isinstance(thing, (tuple, frozenset)) else id(thing)


def _text(thing: Any) -> str:
    if isinstance(thing, _ATOMS):
        text = repr(thing)
        return text if len(text) <= 60 else text[:59] + "…"
    if is_cache(thing):
        return f"cache of {thing.cache_info().currsize}"
    if isinstance(thing, (dict, *_SEQUENCES, *_SETS)):
        return f"{_name(thing)} of {len(thing)}"
    if isinstance(thing, _OPAQUE):
        return f"{_name(thing)} {getattr(thing, '__qualname__', getattr(thing, '__name__', ''))}"
    return _name(thing)


def _name(thing: Any) -> str:
    return type(thing).__name__


def _module(thing: Any) -> str:
    return str(getattr(type(thing), "__module__", ""))
