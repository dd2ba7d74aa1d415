"""Finds in SGLang's text the caches that hold a property of the machine or the installation.

Whether and when such a cache is asked depends on the processor, the GPU and the installed packages:
`is_cpu() and cpu_has_amx_support()` calls the second function only if the first returns True. The
result does not depend on any runner, so that every runner would get the same.
"""

from __future__ import annotations

import ast
import builtins
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

from sglang_distguard.audit.sources import uncollected

_Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]

#: Attributes, of any object, that a runner or its configuration may change.
_CHANGING = {
    "current_device", "current_stream", "current_thread", "distributed", "environ", "get_default_dtype",
    "get_num_threads", "get_rank", "get_world_size", "getenv", "is_initialized",
}  # fmt: skip


class _Module:
    """The names that a module's text defines at module level."""

    def __init__(self, text: str) -> None:
        self.functions: dict[str, _Function] = {}
        self.constants: set[str] = set()
        #: Bare name -> (module, name) it was imported from; name "" for a module.
        self.imported: dict[str, tuple[str, str]] = {}
        tree = ast.parse(text)
        self.rebound = {
            name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names
        }
        self._note(tree.body)

    def _note(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.functions[node.name] = node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self.imported |= _imports(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.constants |= {it.id for it in targets if isinstance(it, ast.Name)}
            elif isinstance(node, (ast.If, ast.Try)):
                handlers = getattr(node, "handlers", [])
                for inner in (node.body, node.orelse, *(it.body for it in handlers)):
                    self._note(inner)


def _imports(node: Union[ast.Import, ast.ImportFrom]) -> dict[str, tuple[str, str]]:
    if isinstance(node, ast.Import):
        return {
            it.asname or it.name.partition(".")[0]: (
                it.name if it.asname else it.name.partition(".")[0],
                "",
            )
            for it in node.names
        }
    return {it.asname or it.name: (node.module or "", it.name) for it in node.names}


@functools.cache
def _module_of(file: str) -> _Module:
    with uncollected():
        return _Module(Path(file).read_text(encoding="utf-8"))


def is_probe(module: str, name: str, files: Mapping[str, str]) -> bool:
    """Whether the cache ``module``.``name`` can hold only a property of machine and installation.

    It takes no arguments. Neither it nor an SGLang function that it calls reads anything that a
    runner or its configuration may change: environment variables, globals that functions rebind,
    classes.

    Args:
        module: module of the cache.
        name: name of the cached function.
        files: source files of the imported SGLang modules.
    """
    function = _function(module, name, files)
    if function is None or _parameters(function):
        return False
    return _reads_the_machine_alone(module, name, files, set())


def _function(module: str, name: str, files: Mapping[str, str]) -> Optional[_Function]:
    file = files.get(module)
    return None if file is None else _module_of(file).functions.get(name)


def _parameters(function: _Function) -> set[str]:
    return {it.arg for it in ast.walk(function.args) if isinstance(it, ast.arg)}


def _reads_the_machine_alone(
    module: str, name: str, files: Mapping[str, str], seen: set[tuple[str, str]]
) -> bool:
    if (module, name) in seen:
        return True
    seen.add((module, name))
    function = _function(module, name, files)
    if function is None:
        return False
    own = _module_of(files[module])
    local = _parameters(function)
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(function):
        if isinstance(node, (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await)):
            return False
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= _imports(node)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            local.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            local.add(node.name)
        elif isinstance(node, ast.Attribute) and node.attr in _CHANGING:
            return False
    names = {it.id for it in ast.walk(function) if isinstance(it, ast.Name)}
    names -= {
        it.id
        for part in function.decorator_list
        for it in ast.walk(part)
        if isinstance(it, ast.Name)
    }
    for it in names - local:
        if it in imported or it in own.imported:
            source, what = imported.get(it) or own.imported[it]
            if source.partition(".")[0] != "sglang":
                if what in _CHANGING:
                    return False
            elif not what or not _is_fixed(source, what, files, seen):
                return False
        elif it in own.functions or it in own.constants:
            if not _is_fixed(module, it, files, seen):
                return False
        elif not hasattr(builtins, it):
            return False
    return True


def _is_fixed(module: str, name: str, files: Mapping[str, str], seen: set[tuple[str, str]]) -> bool:
    """Whether ``module``.``name`` is a constant, or a function that reads only the machine."""
    file = files.get(module)
    if file is None:
        return False
    found = _module_of(file)
    if name in found.functions:
        return _reads_the_machine_alone(module, name, files, seen)
    if name in found.imported:  # re-exported
        source, what = found.imported[name]
        if source.partition(".")[0] != "sglang":
            return what not in _CHANGING
        return bool(what) and _is_fixed(source, what, files, seen)
    return name in found.constants and name not in found.rebound
