"""Where the source of a module comes from, imported or not. Never imports anything of sglang."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from sglang_distguard.errors import NotSupported


@dataclass(frozen=True)
class ModuleSource:
    """The text of one module and the file it came from."""

    module: str
    filename: str
    text: str


def find_source(module: str) -> Optional[ModuleSource]:
    """Return the source of ``module`` without importing it, or None when there is no such module.

    Only the top-level package is looked up through the import system (that imports nothing);
    the rest is a path below it, so that ``install()`` can look before sglang is imported.
    """
    path = _path_of(module)
    return None if path is None or not path.is_file() else _read(module, path)


def sources_below(package: str) -> Iterator[ModuleSource]:
    """The source of every module of ``package``, with those of its packages; none when there is no such."""
    top, *rest = package.split(".")
    spec = importlib.util.find_spec(top)
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location).joinpath(*rest)
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            yield _read(".".join(parts).removesuffix(".__init__"), file)


def _read(module: str, path: Path) -> ModuleSource:
    try:
        return ModuleSource(module, str(path), path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotSupported(
            f"the source of {module} cannot be read ({error}); distguard needs the .py files of SGLang",
            module=module,
        ) from error


def _path_of(module: str) -> Optional[Path]:
    loaded = sys.modules.get(module)
    if loaded is not None and getattr(loaded, "__file__", None):
        return Path(str(loaded.__file__))
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for location in spec.submodule_search_locations or ():
        base = Path(location).joinpath(*rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
