"""Reads the settings of the process: of the operating system, Python, torch, and their C code."""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextvars
import faulthandler
import functools
import gc
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import tracemalloc
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_distguard.audit.graph import digest
from sglang_distguard.config.frozen import is_anything_frozen
from sglang_distguard.process.installation import is_installed

Key = tuple[str, str]


def process() -> Iterator[tuple[Key, Any]]:
    """Yield the key and the present value of each setting."""
    yield from _torch()
    yield from _numbers()
    for name, value in sorted(os.environ.items()):
        yield _variable(name), value
    yield from _operating_system()
    yield from _python()
    for name, count in Counter(map(_thread_of, threading.enumerate())).items():
        yield ("threading", f"threads:{name}"), count
    yield from _context_variables()
    yield from _loggers()


def _operating_system() -> Iterator[tuple[Key, Any]]:
    yield ("os", "sched_getaffinity"), tuple(sorted(os.sched_getaffinity(0)))
    yield ("os", "getcwd"), os.getcwd()
    yield ("os", "getpriority"), os.getpriority(os.PRIO_PROCESS, 0)
    yield ("os", "umask"), _umask()
    for name in sorted(it for it in dir(resource) if it.startswith("RLIMIT_")):
        yield ("resource", name), resource.getrlimit(getattr(resource, name))
    for sign in sorted(signal.valid_signals()):
        yield ("signal", f"getsignal({int(sign)})"), signal.getsignal(sign)
    yield ("locale", "setlocale"), locale.setlocale(locale.LC_ALL)


def _umask() -> str:
    """The file mode mask, from /proc: ``os.umask`` sets it."""
    with Path("/proc/self/status").open() as lines:
        return next((it.split()[1] for it in lines if it.startswith("Umask:")), "")


def _python() -> Iterator[tuple[Key, Any]]:
    for name in ("stdout", "stderr", "excepthook", "unraisablehook", "path", "meta_path"):
        yield ("sys", name), getattr(sys, name)
    yield ("sys", "path_hooks"), sys.path_hooks
    yield ("sys", "getrecursionlimit"), sys.getrecursionlimit()
    yield ("sys", "getswitchinterval"), sys.getswitchinterval()
    yield ("sys", "getprofile"), sys.getprofile()
    yield ("sys", "get_asyncgen_hooks"), tuple(sys.get_asyncgen_hooks())
    yield ("sys", "int_max_str_digits"), sys.get_int_max_str_digits()
    yield ("threading", "excepthook"), threading.excepthook
    yield ("threading", "stack_size"), _thread.stack_size()
    yield ("warnings", "filters"), tuple(map(repr, warnings.filters))
    yield ("warnings", "showwarning"), warnings.showwarning
    yield ("gc", "get_threshold"), gc.get_threshold()
    yield ("gc", "get_freeze_count"), is_anything_frozen()
    yield ("gc", "callbacks"), gc.callbacks
    yield ("gc", "get_debug"), gc.get_debug()
    yield ("atexit", "callbacks"), atexit._ncallbacks()
    yield ("faulthandler", "is_enabled"), faulthandler.is_enabled()
    yield ("tracemalloc", "is_tracing"), tracemalloc.is_tracing()
    yield ("socket", "getdefaulttimeout"), socket.getdefaulttimeout()
    yield ("asyncio", "policy"), asyncio.events._event_loop_policy  # type: ignore[attr-defined]
    yield ("random", "getstate"), digest(repr(random.getstate()).encode())


def _variable(name: str) -> Key:
    """Key of an environment variable.

    With the guard, ``envs`` writes no environment variable, so other code wrote this one.
    """
    fields = getattr(sys.modules.get("sglang.srt.environ"), "Envs", None)
    if name in getattr(fields, "__dict__", ()) and not is_installed():
        return "sglang.srt.environ", f"envs.{name}"
    return "os", f"environ[{name!r}]"


def _context_variables() -> Iterator[tuple[Key, Any]]:
    """The context of the code that observes, without the guard's own variables."""
    found = {
        variable: value
        for variable, value in contextvars.copy_context().items()
        if not variable.name.startswith("sglang_distguard")
    }
    if not found.keys() <= _homes.keys():
        _find_homes()
    for variable, value in found.items():
        named = variable.name.partition("[")[0].rpartition(".")  # torch 2.14: module.name[number]
        yield _homes.setdefault(variable, (named[0] or "contextvars", named[2])), value


#: Key of a context variable: the module that has it, also in a configuration of torch's.
_homes: dict[contextvars.ContextVar[Any], Key] = {}


def _find_homes() -> None:
    """Note the context variables of all modules."""
    for name, module in list(sys.modules.items()):
        found = dict(vars(module)) if isinstance(module, types.ModuleType) else {}
        _homes.update(
            {it: (name, key) for key, it in found.items() if type(it) is contextvars.ContextVar}
        )
        for key, entry in found.get("_config", {}).items() if _is_config(module) else ():
            if type(entry.user_override) is contextvars.ContextVar:  # torch 2.11: the value itself
                _homes[entry.user_override] = name, key


def _is_config(module: Any) -> bool:
    return type(module).__module__ == "torch.utils._config_module"


def _torch() -> Iterator[tuple[Key, Any]]:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    settings = {
        "default_dtype": str(torch.get_default_dtype()),
        "default_device": str(torch.get_default_device()),
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "compiling": torch.compiler.is_compiling(),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "rng": digest(torch.get_rng_state().numpy().tobytes()),
        "grad_mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "autocast": (
            *(torch.is_autocast_enabled("cpu"), str(torch.get_autocast_dtype("cpu"))),
            *(torch.is_autocast_enabled("cuda"), str(torch.get_autocast_dtype("cuda"))),
            torch.is_autocast_cache_enabled(),
        ),
        "flush_denormal": float(torch.full((), 1e-310, dtype=torch.float64) * 1) == 0,
        "print_options": torch._tensor_str.PRINT_OPTS,
        "operators": _operators(),
    }
    for name, value in settings.items():
        yield ("torch", name), value
    for name, read in _getters().items():
        yield ("torch", name), _answer(read)
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        yield ("torch.cuda", "rng"), digest(b"".join(it.numpy().tobytes() for it in states))
        yield ("torch.cuda", "current_device"), torch.cuda.current_device()
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is not None:
        groups = sorted(str(name) for name in c10d._world.pg_names.values())
        yield ("torch.distributed", "process_groups"), tuple(groups)


def _answer(read: Callable[[], Any]) -> str:
    try:
        return str(read())
    except RuntimeError as error:  # torch 2.14: after the older and the newer of two setters
        return type(error).__name__


@functools.cache
def _getters() -> dict[str, Callable[[], Any]]:
    """The functions that read a setting of torch's C++ code for which there is one that sets it."""
    import torch

    found = {}
    for name in dir(torch._C):
        if name.startswith("_set_"):
            setting = name.removeprefix("_set_")
            read = getattr(torch._C, f"_get_{setting}", None)
            if read is not None and setting not in _NO_SETTINGS:
                found[setting] = read
        elif name.startswith("_get_") and name.endswith("_sdp_enabled"):
            found[name.removeprefix("_get_")] = getattr(torch._C, name)
    read = torch._C._get_fp32_precision_getter
    for backend in ("generic", "cuda", "mkldnn"):
        for operator in ("all", "conv", "rnn", "matmul"):
            if backend != "generic" or operator == "all":
                found[f"fp32_precision.{backend}.{operator}"] = functools.partial(
                    read, backend, operator
                )
    return found


#: Values of a trace or of a call in progress, and a function that takes the setting's name.
_NO_SETTINGS = frozenset(
    ["value_trace", "tracing_state", "dispatch_mode", "tensor_metadata", "fp32_precision_getter"]
)


def _operators() -> tuple[int, ...]:
    """How many operators torch knows, and how many have a kernel for some dispatch keys."""
    import torch

    read = torch._C._dispatch_get_registrations_for_dispatch_key
    keys = ("CPU", "CUDA", "CompositeImplicitAutograd", "Meta", "AutogradCPU", "AutogradCUDA")
    return len(torch._C._dispatch_get_all_op_names()), *(len(read(key)) for key in keys)


def _numbers() -> Iterator[tuple[Key, Any]]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return
    yield ("numpy", "rng"), digest(repr(numpy.random.get_state()).encode())
    yield ("numpy", "geterr"), tuple(sorted(numpy.geterr().items()))
    yield ("numpy", "print_options"), repr(numpy.get_printoptions())


def _loggers() -> Iterator[tuple[Key, Any]]:
    known = {"root": logging.getLogger()} | {
        name: logger
        for name, logger in sorted(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger)
    }
    yield ("logging", "disable"), logging.root.manager.disable
    for name, logger in known.items():
        handlers = tuple(type(handler).__name__ for handler in logger.handlers)
        filters = tuple(map(str, logger.filters))
        if logger.level or handlers or filters or logger.disabled or name == "root":
            state = (logger.level, handlers, logger.propagate, filters, logger.disabled)
            yield ("logging", name), state


def _thread_of(thread: threading.Thread) -> str:
    """Name of the function or class that runs in ``thread``."""
    target = getattr(thread, "_target", None)
    thing = type(thread) if target is None or type(thread) is not threading.Thread else target
    return f"{thing.__module__}.{thing.__qualname__}"
