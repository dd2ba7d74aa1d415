"""Which of the wanted changes a module's text has something to change for.

A name that the text does not bind is absent, and so is one that it only imports: then it is defined
in another module. A name that is there in a form that cannot be changed is an error, because its
value would silently be shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.changes import (
    Around,
    AroundMethods,
    Change,
    Needs,
    Reads,
    Replace,
    Within,
    WithinMethods,
    name_of,
)
from sglang_distguard.patching.outline import Outline, outline
from sglang_distguard.patching.source import ModuleSource


@dataclass(frozen=True, order=True)
class Absent:
    """A change that a release has nothing for.

    Attributes:
        module: of the change.
        name: of the change.
        why: the name, or the module, that the text lacks.
    """

    module: str
    name: str
    why: str


def split(
    source: Optional[ModuleSource], changes: Sequence[Change]
) -> tuple[list[Change], list[Absent]]:
    """Split ``changes`` of one module into those that can be made, and the others.

    Args:
        source: of the module; None if there is no such module.
        changes: what is wanted there.

    Raises:
        NotSupported: a name is there, but not in a form that can be changed.
    """
    present: list[Change] = []
    absent: list[Absent] = []
    for change in changes:
        name = name_of(change)
        if source is None:
            absent.append(Absent(change.module, name, f"no module {change.module}"))
            continue
        lacking = list(_lacking(source, change))
        if lacking:
            why = f"no {', '.join(lacking)} in {change.module}"
            absent.append(Absent(change.module, name, why))
        else:
            present.append(change)
    return present, absent


def _lacking(source: ModuleSource, change: Change) -> Iterator[str]:
    """The names that ``change`` needs and the text lacks."""
    if isinstance(change, Reads):  # found in the text
        return
    found = outline(source)
    name = name_of(change)
    if isinstance(change, (Needs, Replace)):
        if not _exists(found, name):
            yield name
    elif isinstance(change, (Around, Within)):
        if name not in found.functions:
            _refuse_other_form(source, found, name, "function")
            yield name
    elif isinstance(change, (AroundMethods, WithinMethods)):
        if name not in found.classes:
            _refuse_other_form(source, found, name, "class")
            yield name
    elif name not in found.bound:
        yield name
    if isinstance(change, Around):
        yield from (it for it in change.uses if not _exists(found, it))
    if isinstance(change, AroundMethods) and change.make_init is not None:
        yield from {f"{name}.__init__"} - set(found.functions)
    if isinstance(change, Within) and name in found.functions:
        _refuse_without_parameter(source, found, change)


def _exists(found: Outline, name: str) -> bool:
    return name in found.bound or name in found.imported or (found.is_open and "." not in name)


def _refuse_other_form(source: ModuleSource, found: Outline, name: str, wanted: str) -> None:
    if name in found.bound:
        raise NotSupported(
            f"{source.module}.{name} is not a {wanted} in this release", module=source.module
        )


def _refuse_without_parameter(source: ModuleSource, found: Outline, change: Within) -> None:
    parameters = found.functions[change.qualname]
    if not parameters if change.argument is None else change.argument not in parameters:
        raise NotSupported(
            f"{source.module}.{change.qualname} has no parameter {change.argument or ''}".rstrip(),
            module=source.module,
        )
