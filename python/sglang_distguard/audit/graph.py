"""What one object holds: its own state in a form to compare, and the objects that it refers to.

Objects are read without running their code, because lazy modules import themselves when an
attribute is read.
"""

from __future__ import annotations
import __future__

import contextvars
import ctypes
import datetime
import decimal
import enum
import fractions
import functools
import gc
import hashlib
import inspect
import itertools
import logging
import operator
import pathlib
import random
import re
import sys
import threading
import types
import typing
import uuid
import weakref
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard.audit import duties
from sglang_distguard.context import environment
from sglang_distguard.patching.syntax import MARK

CACHE = type(functools.lru_cache(lambda: None))
#: Bytes of a tensor, an array or a buffer that are compared; of larger ones only what torch counts.
BYTES = 1 << 16
_ATOMS = frozenset([bool, int, float, complex, str, bytes, type(None)])
_CONSTANT = (
    *(enum.Enum, re.Pattern, range, slice, types.EllipsisType, types.NotImplementedType),
    *(types.CodeType, pathlib.PurePath, uuid.UUID, decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, inspect.Parameter),
    *(inspect.Signature, types.GenericAlias, types.UnionType, typing._Final, typing.TypeVar),
    *(operator.attrgetter, operator.itemgetter, __future__._Feature),
)
#: What they hold is read elsewhere (modules, loggers, threads), or they hold nothing.
_OPAQUE = (
    *(types.ModuleType, logging.Logger, logging.Handler, threading.Thread, BaseException),
    *(types.FrameType, types.TracebackType, types.GetSetDescriptorType, weakref.ReferenceType),
    *(types.MemberDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType),
    *(types.ClassMethodDescriptorType, types.MethodWrapperType, types.CellType),
)
_WEAK_MAPPINGS = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)
_ITERATORS = tuple(
    type(iter(it)) for it in ((), [], "", b"", bytearray(), {}, set(), range(0), deque())
)
_CTYPES = (ctypes._SimpleCData, ctypes.Structure, ctypes.Union, ctypes.Array)
_OF_C = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    types.GetSetDescriptorType,
)
_GUARD = "sglang_distguard"
#: Prefixes of names that are no global of the module or class: those of ``abc``, of Dynamo (torch
#: 2.14: `output_graph`) and of the guard.
_MADE = ("_abc_", "__builtins_dict__", "__compiled_fn_", "__resume_at_", "__import_", MARK)


class Node:
    """One object at the moment when it was read.

    Attributes:
        thing: the object.
        state: equal as long as the object holds the same; other objects are there by identity.
        held: (label, object) of everything else to read.
        kept: keeps the objects alive whose identities are in ``state``, so that no later object can
            have the same identity.
        is_cut: whether there is more than was read.
        unread: the extension type whose state no Python code can read, or None.
    """

    __slots__ = ("held", "is_cut", "kept", "state", "thing", "unread")

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.state: Any = ()
        self.held: list[tuple[Any, Any]] = []
        self.kept: list[Any] = []
        self.is_cut = False
        self.unread: Optional[type] = None

    def token(self, thing: Any, label: Any) -> Any:
        """The form of ``thing`` within the state of this object, which refers to it."""
        kind = type(thing)
        if kind in _ATOMS:
            return kind, repr(thing) if kind is float else thing
        if kind is tuple:  # equal tuples are interchangeable; one of two equal lists may be changed
            return tuple([self.token(it, label) for it in thing])
        if kind is frozenset:
            return frozenset([self.token(it, label) for it in thing])
        self.kept.append(thing)
        if not _holds_nothing(thing):
            self.held.append((label, thing))
        return id(thing)


class Reader:
    """Reads objects, each one once: a reader is for one moment."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        modules = list(sys.modules.values())
        self._namespaces = {id(vars(it)) for it in modules if is_a(it, types.ModuleType)}

    def node(self, thing: Any) -> Node:
        """What ``thing`` holds now."""
        found = self._nodes.get(id(thing))
        if found is None:
            found = self._nodes[id(thing)] = Node(thing)
            if id(thing) not in self._namespaces:
                found.state = _reader_of(type(thing))(thing, found)
        return found


def _holds_nothing(thing: Any) -> bool:
    """Whether it is a function, class or constant that holds nothing that could change."""
    kind = type(thing)
    if kind is types.FunctionType:
        return not (thing.__closure__ or thing.__defaults__ or thing.__kwdefaults__ or vars(thing))
    return _reader_of(kind) is _nothing


@functools.cache
def _reader_of(kind: type) -> Callable[[Any, Node], Any]:
    """The function that reads objects of this type."""
    for base in kind.__mro__:
        if base in _READERS:
            return _READERS[base]
    home = str(kind.__module__)
    if issubclass(kind, (*_OPAQUE, *_CONSTANT)) or home.startswith(_GUARD):
        return _nothing
    if duties.is_of_the_compiler(home):
        return _nothing
    if issubclass(kind, _CTYPES):
        return _buffer
    for name, read in _OTHERS.items():
        if any(f"{it.__module__}.{it.__qualname__}" == name for it in kind.__mro__):
            return read
    return _object


def _nothing(thing: Any, node: Node) -> Any:
    return ()


def _function(thing: Any, node: Node) -> Any:
    if str(thing.__module__).startswith(_GUARD):
        return ()
    state: list[Any] = []
    if thing.__closure__:
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__, strict=False):
            try:
                state.append(node.token(cell.cell_contents, f"<closure>.{name}"))
            except ValueError:  # not set
                state.append(None)
    state.append(node.token(thing.__defaults__, "<defaults>"))
    if thing.__kwdefaults__:
        state.append(_pairs(thing.__kwdefaults__, node, "<defaults>."))
    if vars(thing):
        state.append(_pairs(vars(thing), node, "."))
    return tuple(state)


def _method(thing: Any, node: Node) -> Any:
    return node.token(thing.__self__, "__self__"), node.token(thing.__func__, "__func__")


def _builtin(thing: Any, node: Node) -> Any:
    """Of a method of a container, the container; others belong to modules, or to C code."""
    owner = thing.__self__
    return node.token(owner if is_a(owner, (dict, list, set, deque)) else None, "__self__")


def _wrapped(thing: Any, node: Node) -> Any:
    return node.token(thing.__func__, ""), _pairs(vars(thing), node, ".")


def _property(thing: Any, node: Node) -> Any:
    return tuple(node.token(it, "") for it in (thing.fget, thing.fset, thing.fdel))


def _partial(thing: Any, node: Node) -> Any:
    if is_a_hook(thing):
        return ()
    called = node.token(thing.func, "func"), node.token(thing.args, "args")
    return *called, _pairs(thing.keywords, node, ""), _attributes(thing, node)


def _cache(thing: Any, node: Node) -> Any:
    """Of an lru_cache: its counts, the cached results, and the function's own state."""
    info = thing.cache_info()
    inside = [it for it in gc.get_referents(thing) if type(it) not in _ATOMS]
    found = [node.token(it, "<cached>") for it in inside if not is_a(it, type)]
    return info.misses, info.currsize, tuple(found)


def _pairs(thing: Any, node: Node, prefix: str) -> Any:
    return tuple(
        [
            (node.token(key, "<key>"), node.token(value, f"{prefix}{key}"))
            for key, value in list(dict.items(thing))
            if not is_a_hook(value)
        ]
    )


def _dict(thing: Any, node: Node) -> Any:
    state = []
    for key, value in list(dict.items(thing)):
        label = f"[{key!r}]" if type(key) in _ATOMS else "[…]"
        state.append((node.token(key, "<key>"), node.token(value, label)))
    return tuple(state), _of_subclass(thing, node, dict)


def _mapping(thing: Any, node: Node) -> Any:
    """Of a view of a mapping, or of a weak one."""
    return _dict(dict(thing), node)


def _list(thing: Any, node: Node) -> Any:
    state = tuple([node.token(it, f"[{n}]") for n, it in enumerate(list(thing))])
    return state, _of_subclass(thing, node, list)


def _tuple(thing: Any, node: Node) -> Any:
    state = tuple([node.token(it, f"[{n}]") for n, it in enumerate(tuple(thing))])
    return state, _of_subclass(thing, node, tuple)


def _set(thing: Any, node: Node) -> Any:
    return frozenset([node.token(it, "{…}") for it in tuple(thing)])


def _of_subclass(thing: Any, node: Node, base: type) -> Any:
    return () if type(thing) is base else _attributes(thing, node)


def _context_variable(thing: Any, node: Node) -> Any:
    """Its value in the context of the code that observes."""
    try:
        return node.token(thing.get(), "<value>")
    except LookupError:
        return ()


def _thread_local(thing: Any, node: Node) -> Any:
    """The values of the thread that observes; those of a subclass cannot be read."""
    node.unread = None if type(thing) is threading.local else type(thing)
    return _attributes(thing, node)


def _class(thing: Any, node: Node) -> Any:
    """The attributes of a class that a function made; those of other classes are globals."""
    if "<locals>" not in thing.__qualname__ or not _is_sglangs(thing):
        return ()
    named = {
        name: it
        for name, it in type.__getattribute__(thing, "__dict__").items()
        if not is_special(name)
    }
    return _pairs(named, node, ".")


def _iterator(thing: Any, node: Node) -> Any:
    return tuple(node.token(it, "") for it in thing.__reduce__()[1:])


def _count(thing: Any, node: Node) -> Any:
    return repr(thing)


def _generator(thing: Any, node: Node) -> Any:
    frame = thing.gi_frame
    if frame is None:
        return ()
    return frame.f_lasti, _pairs(dict(frame.f_locals), node, "<local>.")


def _buffer(thing: Any, node: Node) -> Any:
    raw = memoryview(thing).cast("B") if not isinstance(thing, bytearray) else thing
    node.is_cut = len(raw) > BYTES
    return len(raw), digest(bytes(raw[:BYTES]))


def _random(thing: Any, node: Node) -> Any:
    return digest(repr(thing.getstate()).encode())


def _numpy_random(thing: Any, node: Node) -> Any:
    state = thing.get_state() if hasattr(thing, "get_state") else thing.bit_generator.state
    return digest(repr(state).encode())


def _array(thing: Any, node: Node) -> Any:
    """A numpy array: where it is, its form, and its first bytes."""
    form = thing.shape, str(thing.dtype), thing.ctypes.data
    if thing.dtype.hasobject:
        return form, tuple(node.token(it, "[…]") for it in thing.ravel().tolist())
    node.is_cut = thing.nbytes > BYTES
    return form, digest(thing.ravel()[: BYTES // max(thing.itemsize, 1)].tobytes())


def _tensor(thing: Any, node: Node) -> Any:
    """A tensor: its form, how often it was written, and its bytes if they are few and in memory.

    torch does not count writes through ``data`` and by kernels, nor those in inference mode.
    """
    form = tuple(thing.shape), str(thing.dtype), str(thing.device)
    version: Optional[int] = None
    try:
        version = int(thing._version)
    except RuntimeError:  # a tensor of inference mode has no version
        node.is_cut = True
    raw = ""
    is_readable = thing.device.type == "cpu" and thing.layout is sys.modules["torch"].strided
    if is_readable and thing.numel() * thing.element_size() <= BYTES:
        raw, node.is_cut = _bytes_of(thing), False
    return form, version, raw


def _bytes_of(tensor: Any) -> str:
    import torch

    with torch.no_grad():
        try:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            return digest(flat.numpy().tobytes())
        except (RuntimeError, TypeError):  # no storage of its own: meta, fake, subclasses
            return ""


def _generator_of_torch(thing: Any, node: Node) -> Any:
    return digest(thing.get_state().numpy().tobytes()) if thing.device.type == "cpu" else ()


def _object(thing: Any, node: Node) -> Any:
    node.unread = _extension(type(thing))
    return _attributes(thing, node)


@functools.cache
def _extension(kind: type) -> Optional[type]:
    """The first class in the order of ``kind`` that is written in C, except ``object``."""
    for base in kind.__mro__:
        if base is not object and any(
            isinstance(it, _OF_C) and name not in ("__dict__", "__weakref__")
            for name, it in vars(base).items()
        ):
            return base
    return None


def _attributes(thing: Any, node: Node) -> Any:
    return tuple(
        [(name, node.token(it, f".{name}")) for name, it in list(attributes(thing).items())]
    )


def attributes(thing: Any) -> dict[str, Any]:
    """The instance attributes of ``thing``, read without running its code."""
    if type(thing) is threading.local:  # a subclass's constructor runs on a thread's first access
        return vars(thing)
    if is_a(thing, threading.local):
        return {}
    found = {}
    for name, slot in _slots(type(thing)):
        try:
            found[name] = slot.__get__(thing)
        except AttributeError:  # not set
            continue
    try:
        others = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return found
    if isinstance(others, dict):
        found.update((name, it) for name, it in list(others.items()) if not is_a_hook(it))
    return found


@functools.cache
def _slots(kind: type) -> tuple[tuple[str, types.MemberDescriptorType], ...]:
    return tuple(
        (name, slot)
        for base in kind.__mro__
        for name, slot in vars(base).items()
        if isinstance(slot, types.MemberDescriptorType) and not name.startswith("__")
    )


def is_a(thing: Any, kinds: type | tuple[type, ...]) -> bool:
    """As ``isinstance``, which may run code of ``thing``: it asks it for its class."""
    return issubclass(type(thing), kinds)


def is_a_hook(thing: Any) -> bool:
    """Whether it is the guard's (``environment.ask_scopes_first``), and no change by SGLang."""
    return type(thing) is functools.partial and thing.func.__module__ == environment.__name__


def _is_sglangs(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == "sglang"


def is_special(name: str) -> bool:
    """Whether Python made the name, or Dynamo, whose names stay, for compiled code, or the guard."""
    return (name.startswith("__") and name.endswith("__")) or name.startswith(_MADE)


def digest(raw: bytes) -> str:
    """A short text that is equal for equal bytes."""
    return hashlib.sha256(raw).hexdigest()[:12]


_READERS: dict[type, Callable[[Any, Node], Any]] = {
    **dict.fromkeys(_ATOMS - {type(None)}, _nothing),
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinFunctionType: _builtin,
    staticmethod: _wrapped,
    classmethod: _wrapped,
    property: _property,
    functools.partial: _partial,
    CACHE: _cache,
    types.MappingProxyType: _mapping,
    dict: _dict,
    list: _list,
    deque: _list,
    tuple: _tuple,
    set: _set,
    frozenset: _set,
    **dict.fromkeys(_WEAK_MAPPINGS, _mapping),
    weakref.WeakSet: _set,
    contextvars.ContextVar: _context_variable,
    threading.local: _thread_local,
    type: _class,
    **dict.fromkeys(_ITERATORS, _iterator),
    itertools.count: _count,
    types.GeneratorType: _generator,
    bytearray: _buffer,
    array: _buffer,
    random.Random: _random,
    random.SystemRandom: _nothing,
}
#: Types of libraries that may not be imported.
_OTHERS: dict[str, Callable[[Any, Node], Any]] = {
    "functools._lru_list_elem": _nothing,  # the cache itself gives its key and result
    "collections._tuplegetter": _nothing,
    "_collections._tuplegetter": _nothing,
    "triton.runtime.jit.KernelParam": _nothing,
    "torch.utils._config_module._ConfigEntry": _nothing,  # its value is a context variable
    "torch.Tensor": _tensor,
    "torch._C.Generator": _generator_of_torch,
    "torch.dtype": _nothing,
    "torch.device": _nothing,
    "torch.layout": _nothing,
    "torch.Size": _tuple,
    "numpy.ndarray": _array,
    "numpy.generic": _nothing,
    "numpy.dtype": _nothing,
    "numpy.random._generator.Generator": _numpy_random,
    "numpy.random.mtrand.RandomState": _numpy_random,
}
