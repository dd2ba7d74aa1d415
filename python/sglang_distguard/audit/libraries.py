"""Reads the globals of every other library, fast: what its modules and their classes bind.

Of a container it compares the direct contents, of an object its attributes, by identity. Registries
(``REGISTRIES``) are read as deep as SGLang's own globals, by ``observe``.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from sglang_distguard.audit.graph import CACHE, attributes, is_a, is_special

#: Modules, with those inside, whose globals are read to the end: registries that SGLang fills or
#: asks, and what torch applies to every module and operator.
REGISTRIES = (
    *("prometheus_client", "transformers", "tokenizers", "huggingface_hub", "numpy"),
    *("compressed_tensors", "xgrammar", "torch.library", "torch._library", "torch.overrides"),
    *("torch.nn.modules.module", "torch.utils._python_dispatch"),
)
_NOT_LIBRARIES = frozenset(["sglang", "sglang_distguard", "__main__", "__mp_main__", "conftest"])
#: Python's own record of imports, and what ``observe`` reads in detail.
_ELSEWHERE = frozenset(["builtins", "sys", "signal", "threading", "os", "posix", "gc", "cmath"])
_FIXED = (
    *(str, bytes, int, float, complex, bool, type(None), types.FunctionType, types.ModuleType),
    *(types.BuiltinFunctionType, tuple, frozenset, property, classmethod, staticmethod),
)
_Name = tuple[str, str]


@dataclass
class _Module:
    """What one module binds: its namespace, and those of its values that can change."""

    names: tuple[str, ...]
    kept: list[Any]
    identities: tuple[int, ...]
    inside: list[tuple[str, Any]] = field(default_factory=list)


@dataclass
class Libraries:
    """The globals of all libraries at one moment.

    Attributes:
        modules: what each module binds.
        contents: identity -> contents of each container, class and object that a module binds.
        names: identity -> (module, name) under which such a thing is listed.
    """

    modules: dict[str, _Module]
    contents: dict[int, tuple[Any, Any]]
    names: dict[int, _Name]


def is_registry(module: str) -> bool:
    """Whether the globals of ``module`` are read to the end."""
    return any(module == it or module.startswith(it + ".") for it in REGISTRIES)


def is_listed(thing: Any) -> bool:
    """Whether it is a registry of a library, which the module of its class lists."""
    named = _registry_of(type(thing))
    return named is not None and any(it is thing for it in named.values())


@functools.cache
def _registry_of(kind: type) -> Optional[dict[str, Any]]:
    """The globals of the module of ``kind``, if they are read to the end."""
    home = str(kind.__module__)
    return vars(sys.modules[home]) if is_registry(home) and home in sys.modules else None


def libraries(before: Optional[Libraries] = None) -> Libraries:
    """Read the globals of all libraries; ``before``, read earlier, makes it faster."""
    known = {} if before is None else before.modules
    modules: dict[str, _Module] = {}
    contents: dict[int, tuple[Any, Any]] = {}
    names: dict[int, _Name] = {}
    for name, module in sorted(sys.modules.items(), key=lambda it: (len(it[0]), it[0])):
        top = name.partition(".")[0]
        if top in _NOT_LIBRARIES or top in _ELSEWHERE or is_registry(name):
            continue
        try:
            namespace = object.__getattribute__(module, "__dict__")
        except AttributeError:
            continue
        values = list(namespace.values())
        identities = tuple(map(id, values))
        found = known.get(name)
        if found is None or found.identities != identities:
            found = _Module(tuple(namespace), values, identities)
            found.inside = [
                (key, it)
                for key, it in zip(found.names, values, strict=False)
                if not is_special(key) and _changes_inside(it, name)
            ]
        modules[name] = found
        for key, it in found.inside:
            if id(it) not in contents:
                contents[id(it)] = it, _reader_of(type(it))(it)
                names[id(it)] = name, key
    return Libraries(modules, contents, names)


def _changes_inside(thing: Any, module: str) -> bool:
    kind = type(thing)
    if is_a(thing, type):
        return thing.__module__ == module
    if kind in _FIXED or _reader_of(kind) is _nothing:
        return False
    return kind is not CACHE or getattr(thing, "__module__", module) == module


@functools.cache
def _reader_of(kind: type) -> Callable[[Any], Any]:
    for base in kind.__mro__:
        if base in _READERS:
            return _READERS[base]
    return _object if kind.__dictoffset__ else _nothing


def _nothing(thing: Any) -> Any:
    return ()


def _mapping(thing: Any) -> Any:
    return tuple(map(id, dict.keys(thing))), tuple(map(id, dict.values(thing)))


def _sequence(thing: Any) -> Any:
    return tuple(map(id, tuple(thing)))


def _set(thing: Any) -> Any:
    return frozenset(map(id, tuple(thing)))


def _weak(thing: Any) -> Any:
    return len(thing)


def _cache(thing: Any) -> Any:
    info = thing.cache_info()
    return info.misses, info.currsize


def _class(thing: Any) -> Any:
    """Names of Python's own, too: `differences` leaves them out, for the few classes that changed."""
    named = type.__getattribute__(thing, "__dict__")
    return tuple(named), tuple(map(id, named.values()))


def _object(thing: Any) -> Any:
    named = attributes(thing)
    return tuple(named), tuple(map(id, named.values()))


_READERS: dict[type, Callable[[Any], Any]] = {
    dict: _mapping,
    list: _sequence,
    deque: _sequence,
    set: _set,
    weakref.WeakValueDictionary: _weak,
    weakref.WeakKeyDictionary: _weak,
    weakref.WeakSet: _weak,
    CACHE: _cache,
    type: _class,
    itertools.count: repr,
    bytearray: bytes,
    random.Random: lambda thing: hash(thing.getstate()),
    random.SystemRandom: _nothing,
    **dict.fromkeys(_FIXED, _nothing),
}


def differences(before: Libraries, now: Libraries) -> Iterator[tuple[_Name, str, str]]:
    """Yield (module, name), and texts of its value before and after, of each global that changed.

    A module, or a name of a module inside, that a module binds since is no change: it was imported.
    """
    for name, module in now.modules.items():
        old = before.modules.get(name)
        if old is None or old.identities == module.identities:
            continue
        was, now_bound = _bound(old), _bound(module)
        for key in {**was, **now_bound}:
            if is_special(key) or was.get(key) is now_bound.get(key):
                continue
            if key in was or not was_imported(name, key, now_bound[key]):
                yield (name, key), _text(was, key), _text(now_bound, key)
    for key, (thing, contents) in now.contents.items():
        if key in before.contents and before.contents[key][1] != contents:
            module_name, name = now.names[key]
            if not is_a(thing, type):
                yield (module_name, name), *_sizes(thing, before.contents[key][1], contents)
                continue
            was, now_bound = (
                dict(zip(*it, strict=True)) for it in (before.contents[key][1], contents)
            )
            for attribute in {**was, **now_bound}:
                if not is_special(attribute) and was.get(attribute) != now_bound.get(attribute):
                    told = [_presence(it, attribute) for it in (was, now_bound)]
                    yield (module_name, f"{name}.{attribute}"), told[0], told[1]


def _bound(module: _Module) -> dict[str, Any]:
    return dict(zip(module.names, module.kept, strict=True))


def was_imported(module: str, name: str, thing: Any) -> bool:
    """Whether it is a module, or something that another module of the library binds, too."""
    if is_a(thing, types.ModuleType):
        return True
    home = getattr(thing, "__module__", None)
    if isinstance(home, str) and home != module and home in sys.modules:
        return True
    inside = module.partition(".")[0] + "."
    return any(
        other != module and other.startswith(inside) and vars(it).get(name) is thing
        for other, it in list(sys.modules.items())
        if is_a(it, types.ModuleType)
    )


def _text(bound: dict[str, Any], name: str) -> str:
    return type(bound[name]).__name__ if name in bound else "(nothing)"


def _presence(bound: dict[str, int], name: str) -> str:
    return "a value" if name in bound else "(nothing)"


def _sizes(thing: Any, before: Any, now: Any) -> tuple[str, str]:
    name = type(thing).__name__
    if is_a(thing, (itertools.count, bytearray, random.Random)):
        return f"{name} {before}", f"{name} {now}"
    if is_a(thing, CACHE):
        return f"cache of {before[1]}", f"cache of {now[1]}"
    sizes = [it if isinstance(it, int) else len(it) for it in (before, now)]
    if is_a(thing, dict) or _reader_of(type(thing)) is _object:
        sizes = [len(before[0]), len(now[0])]
    return f"{name} of {sizes[0]}", f"{name} of {sizes[1]}"
