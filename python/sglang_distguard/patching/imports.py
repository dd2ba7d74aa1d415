"""Takes over every execution of chosen modules: first imports, imports anew, and reloads.

A finder in front of all others lets them find a module, and wraps its loader for that one execution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Optional

#: Called with a module, its code, and what executes code as it; the code is None when only the loader
#: knows how to execute it: then it is called with None.
Execute = Callable[[ModuleType, Optional[CodeType], Callable[[Optional[CodeType]], None]], None]


class Watcher(MetaPathFinder):
    """Has ``execute`` execute every module whose name is in ``names``.

    What it raises fails the import.
    """

    def __init__(self, names: Container[str], execute: Execute) -> None:
        self._names = names
        self._execute = execute

    def start(self) -> None:
        """Watch from now on."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Watch no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """The spec that the other finders give, with a loader of ours."""
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
    """A loader for one execution; the module keeps the one that it stands for."""

    def __init__(self, loader: Any, execute: Execute) -> None:
        self._loader = loader
        self._execute = execute

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        """As the loader does."""
        module: Optional[ModuleType] = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does, through ``execute``."""
        for holder, name in ((module.__spec__, "loader"), (module, "__loader__")):
            if getattr(holder, name, None) is self:
                setattr(holder, name, self._loader)
        code: Optional[CodeType] = None
        # Others may do more than this one, which executes its code in the module's namespace.
        if type(self._loader) is SourceFileLoader:
            code = self._loader.get_code(module.__name__)

        def run(code: Optional[CodeType]) -> None:
            if code is None:
                self._loader.exec_module(module)
            else:
                exec(code, vars(module))

        self._execute(module, code, run)
