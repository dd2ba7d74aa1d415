"""Reads every process-global that a runner could change: SGLang's own and those of the process."""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import logging
import os
import random
import signal
import sys
import threading
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sglang_distguard.audit.sources import source_of, uncollected
from sglang_distguard.audit.values import Value, is_cache, value_of
from sglang_distguard.patching.syntax import MARK
from sglang_distguard.process.installation import is_installed

#: (module, name); a class's attribute is "Class.attribute".
Key = tuple[str, str]
Observation = dict[Key, Value]
#: Prefixes of the names that Dynamo adds to modules (torch 2.14: `output_graph`).
_DYNAMOS = ("__builtins_dict__", "__compiled_fn_", "__resume_at_", "__import_")
#: `_process` reads these in detail; `sys.modules` grows with every import.
_SEEN_OTHERWISE = frozenset(["os", "sys"])


def observe() -> Observation:
    """Read the present value of every such global, by module and name."""
    collects = gc.isenabled()
    with uncollected():
        own = {key: value_of(thing) for key, thing in (*sglang_globals(), *_process())}
        own["gc", "isenabled"] = value_of(collects)
        others = {key: replace(value_of(it), may_appear=True) for key, it in _foreign()}
    return others | own


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


def _modules() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in sorted(sys.modules.items()):
        if module is not None and (name == "sglang" or name.startswith("sglang.")):
            try:
                yield name, object.__getattribute__(module, "__dict__")
            except AttributeError:
                continue


def sglang_globals() -> Iterator[tuple[Key, Any]]:
    """Attributes of SGLang's modules and their classes, each under the module that defines it."""
    seen: set[int] = set()
    for module, namespace in _modules():
        for name, thing in list(namespace.items()):
            if _is_special(name):
                continue
            if _is_elsewhere(thing, module):
                continue
            yield (module, name), thing
            if isinstance(thing, type) and _is_sglangs(thing) and id(thing) not in seen:
                seen.add(id(thing))
                for attribute, value in list(type.__getattribute__(thing, "__dict__").items()):
                    if not _is_special(attribute) and not isinstance(value, property):
                        yield (module, f"{name}.{attribute}"), value


def _is_sglangs(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == "sglang"


def source_files() -> dict[str, str]:
    """Name of each imported SGLang module -> its source file."""
    found = {name: namespace.get("__file__") for name, namespace in _modules()}
    return {
        name: file for name, file in found.items() if isinstance(file, str) and file.endswith(".py")
    }


def _is_special(name: str) -> bool:
    """Whether Python or Dynamo made the name; Dynamo's stay permanently, for compiled code."""
    return (
        (name.startswith("__") and name.endswith("__"))
        or name.startswith("_abc_")
        or name.startswith(_DYNAMOS)
        or name.startswith(MARK)  # the guard's own
    )


def _is_elsewhere(thing: Any, module: str) -> bool:
    """Whether ``thing`` is an imported function or class, which its own module lists."""
    if not isinstance(thing, (type, types.FunctionType)) and not is_cache(thing):
        return False
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


def _process() -> Iterator[tuple[Key, Any]]:
    yield from _torch()
    for name, value in sorted(os.environ.items()):
        yield _variable(name), value
    yield ("os", "sched_getaffinity"), tuple(sorted(os.sched_getaffinity(0)))
    yield ("os", "getcwd"), os.getcwd()
    for sign in sorted(signal.valid_signals()):
        yield ("signal", f"getsignal({int(sign)})"), signal.getsignal(sign)
    yield ("sys", "stdout"), sys.stdout
    yield ("sys", "stderr"), sys.stderr
    yield ("sys", "excepthook"), sys.excepthook
    yield ("sys", "unraisablehook"), sys.unraisablehook
    yield ("sys", "path"), sys.path
    yield ("threading", "excepthook"), threading.excepthook
    for name, count in Counter(map(_thread, threading.enumerate())).items():
        yield ("threading", f"threads:{name}"), count
    yield ("warnings", "filters"), len(warnings.filters)
    yield ("gc", "get_threshold"), gc.get_threshold()
    yield ("gc", "get_freeze_count > 0"), gc.get_freeze_count() > 0
    yield ("random", "getstate"), _digest(repr(random.getstate()).encode())
    yield from _loggers()


def _variable(name: str) -> Key:
    """Key of an environment variable.

    With the guard, ``envs`` writes no environment variable, so other code wrote this one.
    """
    fields = getattr(sys.modules.get("sglang.srt.environ"), "Envs", None)
    if name in getattr(fields, "__dict__", ()) and not is_installed():
        return "sglang.srt.environ", f"envs.{name}"
    return "os", f"environ[{name!r}]"


def _torch() -> Iterator[tuple[Key, Any]]:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    settings = {
        "default_dtype": str(torch.get_default_dtype()),
        "default_device": str(torch.get_default_device()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "deterministic_fill": torch.utils.deterministic.fill_uninitialized_memory,
        "compiling": torch.compiler.is_compiling(),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "rng": _digest(torch.get_rng_state().numpy().tobytes()),
    }
    for name, value in settings.items():
        yield ("torch", name), value
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield ("numpy", "rng"), _digest(repr(numpy.random.get_state()).encode())
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is not None:
        groups = sorted(str(name) for name in c10d._world.pg_names.values())
        yield ("torch.distributed", "process_groups"), tuple(groups)


def _loggers() -> Iterator[tuple[Key, Any]]:
    known = {"root": logging.getLogger()} | {
        name: logger
        for name, logger in sorted(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger)
    }
    for name, logger in known.items():
        handlers = tuple(type(handler).__name__ for handler in logger.handlers)
        if logger.level or handlers or name == "root":
            yield ("logging", name), (logger.level, handlers, logger.propagate)


def _thread(thread: threading.Thread) -> str:
    """Name of the function or class that runs in ``thread``."""
    target = getattr(thread, "_target", None)
    thing = type(thread) if target is None or type(thread) is not threading.Thread else target
    return f"{thing.__module__}.{thing.__qualname__}"


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:12]
