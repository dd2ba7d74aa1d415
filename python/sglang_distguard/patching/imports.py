"""Take over every execution of chosen modules: first imports, repeated imports, and reloads.

A finder in front of all others asks them for the module, and wraps its loader for one execution.
"""

from __future__ import annotations

import importlib._bootstrap
import sys
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Optional

from sglang_distguard.patching.import_garbage import IMPORTS

#: Called with a module, its code, and a function that executes code as the module. When only the
#: loader knows how to execute the module, the code is None, and that function must be called with
#: None.
Execute = Callable[[ModuleType, Optional[CodeType], Callable[[Optional[CodeType]], None]], None]


class Watcher(MetaPathFinder):
    """Finder that lets ``execute`` execute every module whose name is in ``names``.

    An exception from ``execute`` fails the import.
    """

    def __init__(self, names: Container[str], execute: Execute) -> None:
        self._names = names
        self._execute = execute

    def start(self) -> None:
        """Start watching."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Stop watching."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """Return the spec of the other finders, with its loader wrapped."""
        if fullname not in self._names:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _TakenOver(spec.loader, self._execute)
                return spec
        return None


class _TakenOver(Loader):
    """Wrapper of a loader for one execution; the module keeps the wrapped loader."""

    def __init__(self, loader: Any, execute: Execute) -> None:
        self._loader = loader
        self._execute = execute

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        """Create the module as the wrapped loader does."""
        module: Optional[ModuleType] = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module as the wrapped loader does, through ``execute``."""
        with IMPORTS.one():
            self._exec_module(module)

    def _exec_module(self, module: ModuleType) -> None:
        for holder, name in ((module.__spec__, "loader"), (module, "__loader__")):
            if getattr(holder, name, None) is self:
                setattr(holder, name, self._loader)
        code: Optional[CodeType] = None
        # This loader only executes its code in the module's namespace; other loaders may do more.
        if type(self._loader) is SourceFileLoader:
            code = self._loader.get_code(module.__name__)

        def run(code: Optional[CodeType]) -> None:
            if code is None:
                self._loader.exec_module(module)
            else:
                exec(code, vars(module))

        self._execute(module, code, run)


def is_initializing(name: str) -> bool:
    """Whether the module is being executed now, for the first time."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _importer(name: str) -> Optional[int]:
    """The thread that is now searching for the module ``name`` or executing it.

    That thread holds the module's lock from before it asks the finders (CPython 3.11 to 3.14).
    """
    reference = vars(importlib._bootstrap)["_module_locks"].get(name)
    lock = None if reference is None else reference()
    owner: Optional[int] = getattr(lock, "owner", None)
    return owner


def unfinished(names: Iterable[str]) -> list[str]:
    """The modules in ``names`` that are being imported now."""
    return [name for name in names if is_initializing(name) or _importer(name) is not None]


def is_mine(name: str) -> bool:
    """Whether the calling thread is in the middle of importing the module ``name``."""
    return _importer(name) == threading.get_ident()


def let_finish(name: str, timeout: float) -> bool:
    """Wait until the import of the module ``name`` in another thread ends, with or without success.

    Returns:
        Whether it has ended; False after ``timeout`` seconds.
    """
    # The import statement itself waits in this way (CPython 3.11 to 3.14), without a timeout. A
    # waiting thread that is abandoned after the timeout ends with the import.
    wait: Callable[[str], None] = vars(importlib._bootstrap)["_lock_unlock_module"]
    waiter = threading.Thread(target=wait, args=(name,), name=f"import of {name}", daemon=True)
    waiter.start()
    waiter.join(timeout)
    return not waiter.is_alive()
