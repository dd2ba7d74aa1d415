"""Find and read the source of modules, imported or not. Nothing of sglang is ever imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Optional

from sglang_distguard.errors import NotSupported


@dataclass(frozen=True)
class ModuleSource:
    """The text of one module and the file it came from."""

    module: str
    filename: str
    text: str


def find_source(module: str, at: Optional[Path] = None) -> Optional[ModuleSource]:
    """Return the source of ``module`` without importing it; None if there is none, or only C code.

    Only the top-level package is looked up through the import system, which imports nothing. The
    rest is a path below it. So ``install()`` can read the source before sglang is imported.

    Args:
        module: its dotted name.
        at: a folder, such as an unpacked wheel. The packages that it has are read there, and all
            others in this environment.
    """
    path = _path_of(module, at)
    if path is None or path.suffix != ".py" or not path.is_file():
        return None
    return _read(module, path)


def is_installed(module: str, at: Optional[Path] = None) -> bool:
    """Whether the package that ``module`` belongs to is there; ``at`` as for ``find_source``."""
    top = module.partition(".")[0]
    if _has(at, top):
        return True
    spec = _spec(top)
    return spec is not None and spec.origin is not None  # else a folder that only has its name


@dataclass(frozen=True)
class ModuleFile:
    """A module's source file, with size and time to detect changed content, as .pyc files do."""

    module: str
    filename: str
    size: int
    mtime_ns: int

    def read(self) -> ModuleSource:
        """The source."""
        return _read(self.module, Path(self.filename))


def files_below(package: str, at: Optional[Path] = None) -> list[ModuleFile]:
    """The source files of all modules below ``package``; empty when there is no such package.

    ``at`` is a folder as for ``find_source``.
    """
    top, *rest = package.split(".")
    found = []
    for location in _locations(top, at):
        root = os.path.join(location, *rest)
        for folder, folders, names in os.walk(root):
            folders.sort()
            inside = os.path.relpath(folder, root)
            parts = [package, *([] if inside == os.curdir else inside.split(os.sep))]
            for name in sorted(names):
                if name.endswith(".py"):
                    file = os.path.join(folder, name)
                    about = os.stat(file)
                    module = ".".join([*parts, name.removesuffix(".py")]).removesuffix(".__init__")
                    found.append(ModuleFile(module, file, about.st_size, about.st_mtime_ns))
    return found


def _read(module: str, path: Path) -> ModuleSource:
    try:
        return ModuleSource(module, str(path), path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotSupported(
            f"the source of {module} cannot be read ({error}). The guard needs the .py files of "
            "SGLang",
            module=module,
        ) from error


def _path_of(module: str, at: Optional[Path]) -> Optional[Path]:
    top, *rest = module.split(".")
    if not _has(at, top):
        loaded = sys.modules.get(module)
        if loaded is not None and getattr(loaded, "__file__", None):
            return Path(str(loaded.__file__))
        if not rest:
            spec = _spec(top)
            return Path(spec.origin) if spec is not None and spec.origin else None
    for location in _locations(top, at):
        base = Path(location).joinpath(*rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _has(at: Optional[Path], top: str) -> bool:
    return at is not None and (at / top).is_dir()


def _locations(top: str, at: Optional[Path]) -> Sequence[str]:
    """The folders of the package ``top``."""
    if at is not None and _has(at, top):
        return (str(at / top),)
    spec = _spec(top)
    return (spec and spec.submodule_search_locations) or ()


def _spec(top: str) -> Optional[ModuleSpec]:
    """The spec of a module that is in no package.

    CPython 3.11 asks finders under one lock for all imports, so that a finder that waits in
    another thread would stop this one. ``sys.path`` is looked at without that lock.
    """
    if top not in sys.modules:
        spec = PathFinder.find_spec(top)
        if spec is not None and spec.origin is not None:
            return spec
    try:
        return importlib.util.find_spec(top)
    except ValueError:  # a program has put an object without a spec in the place of the module
        return None
