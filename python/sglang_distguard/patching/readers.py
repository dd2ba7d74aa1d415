"""Finds who reads scoped globals and class attributes of other modules, in source text, without importing any."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from sglang_distguard.patching.plan import Reads
from sglang_distguard.patching.source import sources_below
from sglang_distguard.patching.syntax import owned

#: An import of something of SGLang's: module and names, or module alone. One expression over every
#: file, and then plain sets: an expression that names what is looked for takes ten times as long.
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(sglang\.[\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)"
    r"|import[ \t]+(sglang\.[\w.]+))",
    re.MULTILINE,
)
_WORD = re.compile(r"\w+")


def readers(scoped: Mapping[str, Sequence[str]], package: str) -> list[Reads]:
    """Who in ``package`` seems to read one of ``scoped``, module -> names, of another module.

    What seems to and does not is planned for and left as it is.
    """
    wanted: dict[str, set[str]] = {}
    for module, names in scoped.items():
        for name in names:
            owner, attribute = owned(module, name)
            wanted.setdefault(owner, set()).add(attribute)
    imported = {owner.rpartition(".")[0] for owner in wanted} | set(wanted)
    return [
        Reads(source.module, *read)
        for source in sources_below(package)
        for read in sorted(set(_reads(source.text, wanted, imported)))
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
