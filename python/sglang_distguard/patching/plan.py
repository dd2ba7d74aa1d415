"""What is to be changed in one module, checked against its source, applied to it and undone."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any, Optional, Union

from sglang_distguard._core import OwnFlag, ScopedGlobal
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import code_swap
from sglang_distguard.patching.applied import Applied, MakeHook
from sglang_distguard.patching.code_cache import kept
from sglang_distguard.patching.rewrite import Rewrite, rewrite, with_nested
from sglang_distguard.patching.source import ModuleSource
from sglang_distguard.patching.syntax import MARK, accessor_name
from sglang_distguard.patching.with_blocks import Block


@dataclass(frozen=True)
class Scoped:
    """Every scope has its own value of a module global or class attribute (see ``hooks.process_globals``)."""

    module: str
    name: str


@dataclass(frozen=True)
class Reads:
    """``module`` may read ``of``.``name``, scoped elsewhere (``of`` may be "module.Class"): the scope's."""

    module: str
    of: str
    name: str


@dataclass(frozen=True)
class Raised:
    """``module``'s functions see its flag ``name`` raised where ``here()`` is true, too.

    Everybody else, and what is written, means the process's.
    """

    module: str
    name: str
    here: Callable[[], bool]


@dataclass(frozen=True)
class Around:
    """``make(original)`` returns what runs instead of the function at ``module``.``qualname``.

    The hook is called with the arguments of the call and may call ``original``; for a generator
    function it must be a generator function too.
    """

    module: str
    qualname: str
    make: MakeHook


@dataclass(frozen=True)
class Within:
    """The body of ``module``.``qualname`` runs in a with block: ``with manager(argument): …``.

    Attributes:
        module: where it is.
        qualname: of the function.
        manager: called with the value of ``argument``; returns a context manager.
        argument: name of a parameter; None for the first.
    """

    module: str
    qualname: str
    manager: Callable[[Any], Any]
    argument: Optional[str] = None


@dataclass(frozen=True)
class Replace:
    """``make(original)`` takes the place of an attribute that is not a Python function."""

    module: str
    name: str
    make: MakeHook


@dataclass(frozen=True)
class AroundMethods:
    """``Around`` for every public method and property of a class, and for its constructor if asked."""

    module: str
    classname: str
    make: MakeHook
    make_init: Optional[MakeHook] = None

    def expand(self, names: Sequence[str]) -> list[Around]:
        """One ``Around`` per name in ``names`` that is public, or the constructor."""
        makers = {name: self.make for name in names if not name.startswith("_")}
        if self.make_init is not None:
            makers["__init__"] = self.make_init
        return [
            Around(self.module, f"{self.classname}.{name}", make) for name, make in makers.items()
        ]


@dataclass(frozen=True)
class WithinMethods:
    """``Within`` for every public method of a class for which there is a manager."""

    module: str
    classname: str
    manager_for: Callable[[str], Optional[Callable[[Any], Any]]]

    def expand(self, names: Sequence[str]) -> list[Within]:
        """One ``Within`` per name in ``names`` that is public and has a manager."""
        managers = {name: self.manager_for(name) for name in names if not name.startswith("_")}
        return [
            Within(self.module, f"{self.classname}.{name}", manager)
            for name, manager in managers.items()
            if manager is not None
        ]


@dataclass(frozen=True)
class Needs:
    """``module``.``qualname`` must be defined: a hook uses it."""

    module: str
    qualname: str


Change = Union[Scoped, Reads, Raised, Around, AroundMethods, Within, WithinMethods, Replace, Needs]


@dataclass
class ModulePlan:
    """The changes of one module. Planned from source, before anything is imported or touched.

    Raises (from ``check``):
        NotSupported: the source lacks something a change needs.
    """

    source: ModuleSource
    changes: Sequence[Change]
    #: What was done to each module object of that name: one that is imported anew is another one.
    _applied: list[Applied] = field(default_factory=list, init=False)

    @property
    def module(self) -> str:
        return self.source.module

    @cached_property
    def _rewrite(self) -> Rewrite:
        names = frozenset(self._redirected_names)
        reads = ((it.of, it.name) for it in self.changes if isinstance(it, Reads))
        elsewhere = frozenset(reads)
        blocks = frozenset(
            (it.qualname, Block(_manager_name(it.qualname), it.argument)) for it in self._withins
        )
        if not names and not elsewhere and not blocks:
            return Rewrite({}, {})
        return rewrite(self.source, names, elsewhere, blocks)

    @property
    def _scoped_names(self) -> list[str]:
        return [change.name for change in self.changes if isinstance(change, Scoped)]

    @property
    def _flags(self) -> list[Raised]:
        return [change for change in self.changes if isinstance(change, Raised)]

    @property
    def _redirected_names(self) -> list[str]:
        return [*self._scoped_names, *(flag.name for flag in self._flags)]

    @cached_property
    def _defined(self) -> tuple[str, ...]:
        return _definitions(self.source)

    @cached_property
    def _arounds(self) -> list[Around]:
        found = [change for change in self.changes if isinstance(change, Around)]
        for change in self.changes:
            if isinstance(change, AroundMethods):
                found += change.expand(self._methods(change.classname))
        return found

    @cached_property
    def _withins(self) -> list[Within]:
        found = [change for change in self.changes if isinstance(change, Within)]
        for change in self.changes:
            if isinstance(change, WithinMethods):
                found += change.expand(self._methods(change.classname))
        return found

    def _methods(self, classname: str) -> list[str]:
        prefix = classname + "."
        return [name.removeprefix(prefix) for name in self._defined if name.startswith(prefix)]

    def check(self) -> None:
        """Raise NotSupported unless the source has what every change needs."""
        wanted = [change.qualname for change in (*self._arounds, *self._withins)]
        wanted += [change.qualname for change in self.changes if isinstance(change, Needs)]
        wanted += [
            change.classname
            for change in self.changes
            if isinstance(change, (AroundMethods, WithinMethods))
        ]
        missing = sorted(set(wanted) - set(self._defined))
        if missing:
            raise NotSupported(
                f"{self.module} has no {', '.join(missing)}", module=self.module, missing=missing
            )
        _ = self._rewrite

    def apply(
        self,
        module: ModuleType,
        functions: Optional[Sequence[FunctionType]] = None,
        *,
        again: bool = False,
    ) -> None:
        """Change the imported ``module``; nothing happens when that is done already.

        Args:
            module: the module itself.
            functions: its live functions, when the caller has looked for them already.
            again: its code was executed anew: what that defined is changed, what was before stays so.
        """
        if module in self.applied_to and not again:
            return
        applied = Applied(module)
        with applied.undone_on_error():
            if self._is_rewritten:
                found = code_swap.functions_of(module) if functions is None else functions
                self._inject_globals(applied)
                applied.swap(self._rewrite.replaced, found)
                self._check_no_raw_access((it.__code__, it.__qualname__) for it in found)
        self.finish(applied)

    def begin(self, module: ModuleType, code: CodeType) -> tuple[Applied, CodeType]:
        """Prepare ``module`` for being executed, first or anew, as the code that is returned.

        Its functions are born changed: nobody has to look for them, which takes 50 ms for each module.

        Args:
            module: the module itself.
            code: all of its own.

        Returns:
            What is to be given to ``finish`` after the execution, or undone; the code to execute.
        """
        applied = Applied(module)
        with applied.undone_on_error():
            if self._is_rewritten:
                self._inject_globals(applied)
                code = applied.born(code, self._rewrite.replaced)
                self._check_no_raw_access((it, it.co_qualname) for it in with_nested(code))
        return applied, code

    def finish(self, applied: Applied) -> None:
        """Do what is left when the module has been executed and its functions are changed."""
        module = applied.module
        before = next((it for it in self._applied if it.module is module), None)
        if before is not None:
            before.prepare_again()
        with applied.undone_on_error():
            self._inject_attributes(applied)
            self._check_enclosed(module)
            for change in self._arounds:
                function = code_swap.resolve_function(module, change.qualname)
                applied.hook(function, change.qualname, change.make)
            for change in self.changes:
                if isinstance(change, Replace):
                    applied.set_attribute(change.name, change.make(getattr(module, change.name)))
        if before is not None:
            applied.take_over(before)
            self._applied.remove(before)
        self._applied.append(applied)

    def keep(self, failed: Applied) -> bool:
        """A module that was changed before stays changed when executing it anew has failed.

        Its functions, old and new, have one code: undoing the new ones would undo all.

        Returns:
            Whether it was changed before; otherwise ``failed`` is to be undone.
        """
        before = next((it for it in self._applied if it.module is failed.module), None)
        if before is not None:
            before.take_over(failed)
        return before is not None

    def undo(self, functions: Optional[Mapping[int, Sequence[FunctionType]]] = None) -> None:
        """Put everything back; nothing happens when nothing was applied.

        Args:
            functions: the live functions of modules, by ``id``, when the caller has looked for them.
        """
        applied, self._applied = self._applied, []
        for it in applied:
            it.undo(None if functions is None else functions.get(id(it.module)))

    @property
    def applied_to(self) -> list[ModuleType]:
        """The modules that are changed now: one, and those that were imported before it."""
        return [it.module for it in self._applied]

    @property
    def _is_rewritten(self) -> bool:
        return bool(self._rewrite.replaced or self._redirected_names)

    def _inject_globals(self, applied: Applied) -> None:
        """What functions of the module ask for; it need not have been executed."""
        namespace = vars(applied.module)
        for name in self._scoped_names:
            if "." not in name:
                initial = eval(self._rewrite.initials[name], namespace)
                applied.inject(accessor_name(name), ScopedGlobal(namespace, name, initial))
        for flag in self._flags:
            applied.inject(accessor_name(flag.name), OwnFlag(namespace, flag.name, flag.here))
        for within in self._withins:
            applied.inject(_manager_name(within.qualname), within.manager)

    def _inject_attributes(self, applied: Applied) -> None:
        """What is asked for through the module or its classes, once they are there."""
        namespace = vars(applied.module)
        own: dict[str, ScopedGlobal] = {}
        for name in self._scoped_names:
            *path, last = name.split(".")
            if not path:
                own[name] = namespace[accessor_name(name)]
                continue
            owner: Any = applied.module
            for part in path:
                owner = getattr(owner, part)
            initial = eval(self._rewrite.initials[name], namespace)
            applied.inject(accessor_name(last), ScopedGlobal(owner, last, initial), owner)
        if own:
            applied.give_attributes(own)

    def _check_enclosed(self, module: ModuleType) -> None:
        for within in self._withins:
            function = code_swap.resolve_function(module, within.qualname)
            if _manager_name(within.qualname) not in function.__code__.co_names:
                raise NotSupported(
                    f"{self.module}.{within.qualname} is not the function that the source file defines; "
                    "was it changed at run time? Install before that",
                    module=self.module,
                    missing=[within.qualname],
                )

    def _check_no_raw_access(self, codes: Iterable[tuple[CodeType, str]]) -> None:
        """No function may still reach a scoped global directly: it would see another runner's.

        Fails when the running code is not what the source on disk says, and for an attribute that
        is reached in another way than through its class (``self.X``).
        """
        names = frozenset(name for name in self._redirected_names if "." not in name)
        attributes = frozenset(
            name.rpartition(".")[2] for name in self._scoped_names if "." in name
        )
        for code, qualname in codes:
            if not code.co_flags & inspect.CO_OPTIMIZED:
                # A module's own code, or a class's: it runs once, or a frame keeps it (CPython 3.11).
                continue
            raw = code_swap.reached(code, code_swap.GLOBALS, names)
            raw |= code_swap.reached(code, code_swap.ATTRIBUTES, attributes)
            if raw:
                raise NotSupported(
                    f"{self.module}.{qualname} uses {sorted(raw)} in a way that cannot be redirected, or "
                    "is not the function that the source file defines; was it changed at run time?",
                    module=self.module,
                )


def _manager_name(qualname: str) -> str:
    """The module global that a function's body asks for its with block."""
    return f"{MARK}within_{qualname.replace('.', '__')}"


@cache
def _definitions(source: ModuleSource) -> tuple[str, ...]:
    """Qualified names of the functions and classes a module defines, in order, each once."""
    return tuple(kept(("definitions", source.text), lambda: _read_definitions(source)))


def _read_definitions(source: ModuleSource) -> tuple[str, ...]:
    found: dict[str, None] = {}

    def collect(body: Sequence[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[prefix + node.name] = None
            elif isinstance(node, ast.ClassDef):
                found[prefix + node.name] = None
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.If, ast.Try)):
                collect(node.body, prefix)
                collect(node.orelse, prefix)

    collect(ast.parse(source.text, source.filename).body, "")
    return tuple(found)
