"""Finds the modules that read scoped globals of other modules, in source text, without importing any."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from sglang_distguard.patching.plan import Reads
from sglang_distguard.patching.source import sources_below

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
    owners = {module.rpartition(".")[0] for module in scoped} | set(scoped)
    return [
        Reads(source.module, *read)
        for source in sources_below(package)
        for read in sorted(set(_reads(source.text, scoped, owners)))
        if read[0] != source.module
    ]


def _reads(
    text: str, scoped: Mapping[str, Sequence[str]], owners: set[str]
) -> Iterator[tuple[str, str]]:
    for owner, names, module in _IMPORT.findall(text):
        if owner in owners:
            words = set(_WORD.findall(names))
            for name in words.intersection(scoped.get(owner, ())):
                yield owner, name
            modules = [f"{owner}.{word}" for word in words]
        else:
            modules = [module]
        for whole in modules:
            for name in scoped.get(whole, ()):
                if f".{name}" in text:
                    yield whole, name
