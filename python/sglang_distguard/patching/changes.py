"""The kinds of change to a module: what is wanted, by name, before any source is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional, Union

from sglang_distguard.patching.applied import MakeHook
from sglang_distguard.patching.generators import each_item_within
from sglang_distguard.patching.outline import Outline


@dataclass(frozen=True)
class Scoped:
    """A module global or class attribute of which every scope has its own value.

    See ``hooks.process_globals``.
    """

    module: str
    name: str


@dataclass(frozen=True)
class Reads:
    """``module`` may read ``of``.``name``, which is scoped, and must get the running scope's value.

    ``of`` is another module, or "module.Class".
    """

    module: str
    of: str
    name: str


@dataclass(frozen=True)
class Raised:
    """Functions of ``module`` see its flag ``name`` as set while ``here()`` is true, too.

    All other code reads the process's flag. Every write sets the process's flag.
    """

    module: str
    name: str
    here: Callable[[], bool]


@dataclass(frozen=True)
class Around:
    """``make(original)`` returns a hook that runs instead of the function ``module``.``qualname``.

    The hook is called with the arguments of the call and may call ``original``. For a generator
    function the hook must be a generator function, too.

    Attributes:
        module: the function's module.
        qualname: the function's qualified name.
        make: takes the function and returns the hook.
        uses: other names of the module without which the hook cannot work.
    """

    module: str
    qualname: str
    make: MakeHook
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Within:
    """The body of ``module``.``qualname`` runs in a with block: ``with manager(argument): …``.

    It must not be a generator function: the block would stay entered in the code between two items.
    One that ``contextlib.contextmanager`` decorates may be: its caller is in a with block, too.

    Attributes:
        module: the function's module.
        qualname: the function's qualified name.
        manager: called with the value of ``argument``; returns a context manager.
        argument: name of a parameter; None for the first.
    """

    module: str
    qualname: str
    manager: Callable[[Any], Any]
    argument: Optional[str] = None


@dataclass(frozen=True)
class Replace:
    """``make(original)`` returns the replacement of an attribute that is not a Python function.

    Given a replacement, which a module has copied from another one at its import, ``make`` returns
    it. Its original is its ``__replaced__``.
    """

    module: str
    name: str
    make: MakeHook


@dataclass(frozen=True)
class AroundMethods:
    """``Around`` for every public method and property of a class.

    ``make_init``, if given, makes the hook of its constructor. With ``only``, those of these names
    that the class has: not every release has all of them.
    """

    module: str
    classname: str
    make: MakeHook
    make_init: Optional[MakeHook] = None
    only: Optional[frozenset[str]] = None

    def expand(self, found: Outline) -> list[Around]:
        """One ``Around`` per method that is public, or the constructor."""
        names = _public(found, self.classname)
        makers = {name: self.make for name in names if self.only is None or name in self.only}
        if self.make_init is not None:
            makers["__init__"] = self.make_init
        return [
            Around(self.module, f"{self.classname}.{name}", make) for name, make in makers.items()
        ]


@dataclass(frozen=True)
class WithinMethods:
    """``Within`` for every public method of a class for which ``manager_for`` returns a manager.

    Of an asynchronous generator, each item is made in such a with block (``generators``).
    """

    module: str
    classname: str
    manager_for: Callable[[str], Optional[Callable[[Any], Any]]]

    def expand(self, found: Outline) -> list[Within | Around]:
        """One change per method that is public and has a manager."""
        changes: list[Within | Around] = []
        for name in _public(found, self.classname):
            manager = self.manager_for(name)
            qualname = f"{self.classname}.{name}"
            if manager is None:
                continue
            if qualname in found.generators & found.asynchronous:
                changes.append(Around(self.module, qualname, each_item_within(manager)))
            else:
                changes.append(Within(self.module, qualname, manager))
        return changes


def _public(found: Outline, classname: str) -> Iterator[str]:
    prefix = f"{classname}."
    for qualname in found.functions:
        name = qualname.removeprefix(prefix)
        if name != qualname and not name.startswith("_"):
            yield name


@dataclass(frozen=True)
class Needs:
    """``module``.``qualname`` must exist in any form; ``why`` says what for."""

    module: str
    qualname: str
    why: str = ""


Change = Union[Scoped, Reads, Raised, Around, AroundMethods, Within, WithinMethods, Replace, Needs]


def name_of(change: Change) -> str:
    """The name in the module that ``change`` is about."""
    if isinstance(change, (Around, Within, Needs)):
        return change.qualname
    if isinstance(change, (AroundMethods, WithinMethods)):
        return change.classname
    return change.name
