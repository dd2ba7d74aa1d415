"""Swap the code of live functions, and restore it.

A function keeps its identity. So every module that did `from x import f`, every closure and every
registry that holds it sees the change, and undoing needs no search for such references.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from sglang_distguard.config.frozen import is_anything_frozen
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.instructions import GLOBALS, reached
from sglang_distguard.patching.rewrite import with_nested
from sglang_distguard.patching.syntax import MARK, SCOPES_EXIST, accessor_name


def functions_of(module: ModuleType) -> list[FunctionType]:
    """All live functions whose globals are this module's, wherever they are referenced.

    A function refers to its globals. So the garbage collector also finds functions that only a
    closure, a decorator or a registry holds. This is one C loop over all tracked objects (measured:
    80 ms with sglang imported). For several modules at once use ``functions_by_module``.
    """
    if is_anything_frozen():
        return functions_by_module([module])[id(module)]
    namespace = vars(module)
    return [
        referrer
        for referrer in gc.get_referrers(namespace)
        if type(referrer) is FunctionType and referrer.__globals__ is namespace
    ]


def functions_by_module(modules: Iterable[ModuleType]) -> dict[int, list[FunctionType]]:
    """``functions_of`` for several modules, by ``id``, in one pass over the tracked objects."""
    by_namespace = {id(vars(module)): id(module) for module in modules}
    found: dict[int, list[FunctionType]] = {module: [] for module in by_namespace.values()}
    for candidate in _tracked():
        # Not isinstance: it would run the `__class__` property of every proxy in the process.
        if type(candidate) is FunctionType:
            module = by_namespace.get(id(candidate.__globals__))
            if module is not None:
                found[module].append(candidate)
    return found


def _tracked() -> list[Any]:
    """All objects that the garbage collector tracks, including those behind ``gc.freeze``.

    ``get_objects`` and ``get_referrers`` do not return frozen objects (CPython 3.11). They are
    thawed for a moment, and frozen again together with all other live objects.
    """
    if not is_anything_frozen():
        return gc.get_objects()
    gc.collect()  # freezing would keep garbage alive
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        gc.freeze()


def swap_code(
    functions: Iterable[FunctionType], codes: Mapping[CodeType, CodeType]
) -> dict[CodeType, CodeType]:
    """Give every function whose code is a key of ``codes`` the code that the key maps to.

    Returns:
        New code -> former code. The former code equals the key, but is the function's own object.
    """
    swapped = {}
    for function in functions:
        before = function.__code__
        replacement = codes.get(before)
        if replacement is not None:
            function.__code__ = replacement
            swapped[replacement] = before
    return swapped


def trampoline(function: FunctionType, hook_name: str) -> CodeType:
    """Code for ``function`` that calls the module global ``hook_name`` with the same arguments.

    From outside it looks like the function's own code: parameters, names, file, line. A generator
    function stays a generator function, because SGLang decorates some with ``contextmanager``.
    """
    code = function.__code__
    names = code.co_varnames
    plain = names[: code.co_argcount]
    named = names[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    rest = iter(names[code.co_argcount + code.co_kwonlyargcount :])
    every = f"*{next(rest)}" if code.co_flags & inspect.CO_VARARGS else ""
    others = f"**{next(rest)}" if code.co_flags & inspect.CO_VARKEYWORDS else ""
    only = code.co_posonlyargcount
    parameters = [*plain[:only], *(["/"] if only else []), *plain[only:]]
    parameters += [every or "*", *named] if named or every else []
    given = [*plain, every, *(f"{name}={name}" for name in named), others]
    call = f"{hook_name}({', '.join(filter(None, given))})"
    if inspect.isgeneratorfunction(function):
        call = f"(yield from {call})"
    text = f"def made({', '.join([*parameters, *filter(None, [others])])}): return {call}"
    module = compile(text, code.co_filename, "exec", dont_inherit=True)
    made = next(it for it in module.co_consts if isinstance(it, CodeType))
    # Free variables are declared because the closure must fit. They are never read: the code lacks
    # COPY_FREE_VARS (CPython 3.11+), the instruction that would read them.
    return made.replace(
        co_name=code.co_name,
        co_qualname=code.co_qualname,
        co_freevars=code.co_freevars,
        co_firstlineno=code.co_firstlineno,
    )


def is_changed(code: CodeType) -> bool:
    """Whether the guard changed ``code`` or a function in it."""
    return any(name.startswith(MARK) for it in with_nested(code) for name in it.co_names)


def unscoped_reads(function: FunctionType) -> list[str]:
    """Scoped globals of its module that ``function`` reaches directly, without their accessors."""
    codes = list(with_nested(function.__code__))
    used = {name for code in codes for name in code.co_names}
    scoped = frozenset(name for name in used if accessor_name(name) in function.__globals__)
    return sorted({name for code in codes for name in reached_directly(code, scoped)})


def reached_directly(code: CodeType, names: frozenset[str]) -> set[str]:
    """The globals in ``names`` that ``code`` reaches without their accessors, in some scope."""
    return set() if SCOPES_EXIST in code.co_names else reached(code, GLOBALS, names)


def detached(function: FunctionType) -> FunctionType:
    """A copy of ``function`` as it is now, for a hook to call."""
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    copy.__module__ = function.__module__
    copy.__doc__ = function.__doc__
    copy.__annotations__ = function.__annotations__
    return copy


def resolve_function(owner: object, qualname: str) -> FunctionType:
    """The innermost plain function behind ``owner.qualname``, below decorators and descriptors.

    Raises:
        NotSupported: there is no such function.
    """
    *path, last = qualname.split(".")
    for name in path:
        owner = getattr(owner, name, None)
    found = inspect.getattr_static(owner, last, None)
    if isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    elif isinstance(found, property):
        found = found.fget
    if callable(found):
        found = inspect.unwrap(found)
    if not isinstance(found, FunctionType):
        where = getattr(owner, "__name__", owner)
        raise NotSupported(f"{where}.{last} is not a Python function", missing=[qualname])
    return found
