"""Reads every process-global that a runner could change.

These are SGLang's own globals and the registries of other libraries (read to the end), everything
that SGLang's text writes elsewhere, and the settings of the process. ``libraries`` has the others.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard.audit.graph import Reader, is_a, is_special
from sglang_distguard.audit.libraries import is_listed, is_registry
from sglang_distguard.audit.settings import process
from sglang_distguard.audit.sources import source_of, uncollected
from sglang_distguard.audit.values import Value, is_cache, value_of

#: (module, name); a class's attribute is "Class.attribute".
Key = tuple[str, str]
Observation = dict[Key, Value]
#: ``settings`` reads these in detail; `sys.modules` grows with every import.
_SEEN_OTHERWISE = frozenset(["os", "sys"])


def observe() -> Observation:
    """Read the present value of every such global, by module and name."""
    collects = gc.isenabled()
    with uncollected():
        reader = Reader()
        own = {key: value_of(thing, reader) for key, thing in (*sglang_globals(), *process())}
        own["gc", "isenabled"] = value_of(collects, reader)
        others = {key: value_of(it, reader) for key, it in _foreign()}
        for it in others.values():
            it.may_appear = True
        registries = {key: value_of(it, reader) for key, it in globals_of(is_registry)}
    return registries | others | own


def _foreign() -> Iterator[tuple[Key, Any]]:
    """Globals outside SGLang that the imported SGLang modules write, according to their text."""
    keys = {
        (write.module, write.name)
        for module, file in source_files().items()
        for write in source_of(module, file).writes
        if not write.module.startswith("sglang.") and write.module not in _SEEN_OTHERWISE
    }
    for module, name in sorted(keys):
        thing: Any = sys.modules.get(module)
        for attribute in name.split("."):
            thing = _attribute(thing, attribute)
        yield (module, name), thing


def _attribute(thing: Any, name: str) -> Any:
    """The attribute or None; runs no code of ``thing``, except of torch's configuration modules."""
    if str(getattr(thing, "__name__", "")).startswith("torch."):
        return getattr(thing, name, None)
    return inspect.getattr_static(thing, name, None)


def _is_sglangs(module: str) -> bool:
    return module == "sglang" or module.startswith("sglang.")


def _modules(chosen: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in sorted(sys.modules.items()):
        if module is not None and chosen(name):
            try:
                yield name, object.__getattribute__(module, "__dict__")
            except AttributeError:
                continue


def sglang_globals() -> Iterator[tuple[Key, Any]]:
    """Attributes of SGLang's modules and their classes, each under the module that defines it."""
    return globals_of(_is_sglangs)


def globals_of(chosen: Callable[[str], bool]) -> Iterator[tuple[Key, Any]]:
    """As ``sglang_globals``, of the modules that ``chosen`` accepts the name of."""
    seen: set[int] = set()
    for module, namespace in _modules(chosen):
        for name, thing in list(namespace.items()):
            if is_special(name):
                continue
            if _is_elsewhere(thing, module):
                continue
            yield (module, name), thing
            if is_a(thing, type) and chosen(str(thing.__module__)):
                yield from _attributes_of(module, name, thing, seen)


def _attributes_of(module: str, name: str, kind: type, seen: set[int]) -> Iterator[tuple[Key, Any]]:
    if id(kind) in seen:
        return
    seen.add(id(kind))
    for attribute, value in list(type.__getattribute__(kind, "__dict__").items()):
        if not is_special(attribute):
            if str(type(value).__module__) == module or not is_listed(value):
                yield (module, f"{name}.{attribute}"), value
            if is_a(value, type) and value.__qualname__ == f"{kind.__qualname__}.{attribute}":
                yield from _attributes_of(module, f"{name}.{attribute}", value, seen)


def source_files() -> dict[str, str]:
    """Name of each imported SGLang module -> its source file."""
    found = {name: namespace.get("__file__") for name, namespace in _modules(_is_sglangs)}
    return {
        name: file for name, file in found.items() if isinstance(file, str) and file.endswith(".py")
    }


def _is_elsewhere(thing: Any, module: str) -> bool:
    """Whether ``thing`` is imported, and its own module lists it."""
    if is_a(thing, types.MethodType):  # `numpy.random.normal` is a method of numpy's one generator
        return is_listed(thing.__self__)
    if not is_a(thing, (type, types.FunctionType)) and not is_cache(thing):
        return str(type(thing).__module__) != module and is_listed(thing)
    name = getattr(thing, "__name__", "")
    made: Any = thing
    if is_cache(thing) and not name:  # a cached functools.partial, which has no name and no module
        made = made.__wrapped__
        while isinstance(made, functools.partial):
            made = made.func
    home = getattr(made, "__module__", None)
    if not isinstance(home, str) or home == module or home not in sys.modules:
        return False
    there = vars(sys.modules[home])
    return there.get(name) is thing if name else any(it is thing for it in there.values())
