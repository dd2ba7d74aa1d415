"""Find the modules that read scoped globals or class attributes of other modules.

Only source text is searched; no module is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Optional

from sglang_distguard.patching.changes import Reads
from sglang_distguard.patching.code_cache import kept
from sglang_distguard.patching.source import ModuleFile, files_below
from sglang_distguard.patching.syntax import owned

#: An import from SGLang: module and names, or module alone. One expression runs over every file,
#: and plain sets do the rest: an expression that contains the wanted names takes ten times as long.
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(sglang\.[\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)"
    r"|import[ \t]+(sglang\.[\w.]+))",
    re.MULTILINE,
)
_WORD = re.compile(r"\w+")


def readers(
    scoped: Mapping[str, Sequence[str]], package: str, at: Optional[Path] = None
) -> list[Reads]:
    """Find modules in ``package`` that seem to read ``scoped`` names (module -> names) of others.

    A module that only seems to read one is planned for, too, and stays unchanged. ``at`` is a
    folder as for ``find_source``.
    """
    files = files_below(package, at)
    looked_for = sorted((module, sorted(names)) for module, names in scoped.items())
    found = kept(("readers", files, looked_for), lambda: _find(files, scoped))
    return [Reads(*it) for it in found]


def _find(
    files: Sequence[ModuleFile], scoped: Mapping[str, Sequence[str]]
) -> list[tuple[str, str, str]]:
    """The fields of each ``Reads``."""
    wanted: dict[str, set[str]] = {}
    for module, names in scoped.items():
        for name in names:
            owner, attribute = owned(module, name)
            wanted.setdefault(owner, set()).add(attribute)
    imported = {owner.rpartition(".")[0] for owner in wanted} | set(wanted)
    return [
        (file.module, *read)
        for file in files
        for read in sorted(set(_reads(file.read().text, wanted, imported)))
    ]


def _reads(
    text: str, wanted: Mapping[str, set[str]], imported: set[str]
) -> Iterator[tuple[str, str]]:
    for package, names, module in _IMPORT.findall(text):
        if package in imported:
            words = set(_WORD.findall(names))
            for name in words & wanted.get(package, set()):
                yield package, name
            owners = [f"{package}.{word}" for word in words]
        else:
            owners = [module]
        for owner in owners:
            for name in wanted.get(owner, ()):
                if f".{name}" in text:
                    yield owner, name
