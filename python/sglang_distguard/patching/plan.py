"""The plan of changes to one module: checked against its source, applied, and undone."""

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
    """

    module: str
    qualname: str
    make: MakeHook


@dataclass(frozen=True)
class Within:
    """The body of ``module``.``qualname`` runs in a with block: ``with manager(argument): …``.

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
    """``make(original)`` returns the replacement of an attribute that is not a Python function."""

    module: str
    name: str
    make: MakeHook


@dataclass(frozen=True)
class AroundMethods:
    """``Around`` for every public method and property of a class.

    ``make_init``, if given, makes the hook of its constructor.
    """

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
    """``Within`` for every public method of a class for which ``manager_for`` returns a manager."""

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
    """The changes of one module, planned from source before anything is imported or changed.

    Raises (from ``check``):
        NotSupported: the source lacks something a change needs.
    """

    source: ModuleSource
    changes: Sequence[Change]
    #: The changes made to each module object of that name; importing it again makes another object.
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
        flags = frozenset(flag.name for flag in self._flags)
        return rewrite(self.source, names, elsewhere, blocks, flags)

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
        """Change the imported ``module``; do nothing when it is changed already.

        Args:
            module: the module itself.
            functions: its live functions, when the caller has already found them.
            again: the module's code was executed again. The functions that this defined are
                changed; earlier functions stay changed.
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
        """Prepare the execution of ``module``, for the first time or again, as the returned code.

        Its functions are created with changed code. This saves a search for them, which takes 50 ms
        for each module.

        Args:
            module: the module itself.
            code: code of the whole module.

        Returns:
            The changes, which the caller must pass to ``finish`` after the execution, or undo; and
            the code to execute.
        """
        applied = Applied(module)
        with applied.undone_on_error():
            if self._is_rewritten:
                self._inject_globals(applied)
                code = applied.born(code, self._rewrite.replaced)
                self._check_no_raw_access((it, it.co_qualname) for it in with_nested(code))
        return applied, code

    def finish(self, applied: Applied) -> None:
        """Make the remaining changes, once the module is executed and its functions are changed."""
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
        """Keep a formerly changed module changed, after executing it again has failed.

        Its old and new functions share the same code: undoing the new functions would undo all.

        Returns:
            Whether the module was changed before; otherwise the caller must undo ``failed``.
        """
        before = next((it for it in self._applied if it.module is failed.module), None)
        if before is not None:
            before.take_over(failed)
        return before is not None

    def undo(self, functions: Optional[Mapping[int, Sequence[FunctionType]]] = None) -> None:
        """Undo all changes; do nothing when none were applied.

        Args:
            functions: the live functions of each module, by the module's ``id``, when the caller
                has already found them.
        """
        applied, self._applied = self._applied, []
        for it in applied:
            it.undo(None if functions is None else functions.get(id(it.module)))

    @property
    def applied_to(self) -> list[ModuleType]:
        """The module objects that are changed now: the current one and those imported before it."""
        return [it.module for it in self._applied]

    @property
    def _is_rewritten(self) -> bool:
        return bool(self._rewrite.replaced or self._redirected_names)

    def _inject_globals(self, applied: Applied) -> None:
        """Add the globals that changed functions use; the module need not have been executed."""
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
        """Add the accessors that are reached through the module or its classes, once they exist."""
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
                    f"{self.module}.{within.qualname} is not the function that the source file "
                    "defines. Was it changed at run time? Call install() before that change",
                    module=self.module,
                    missing=[within.qualname],
                )

    def _check_no_raw_access(self, codes: Iterable[tuple[CodeType, str]]) -> None:
        """Refuse functions that still reach a scoped global directly.

        They would see another runner's value. This fails when the running code differs from the
        source on disk, and for an attribute that is not reached through its class (``self.X``).
        """
        names = frozenset(name for name in self._redirected_names if "." not in name)
        attributes = frozenset(
            name.rpartition(".")[2] for name in self._scoped_names if "." in name
        )
        for code, qualname in codes:
            if not code.co_flags & inspect.CO_OPTIMIZED:
                # The body of a module or class: it runs once, or a frame keeps it (CPython 3.11).
                continue
            raw = code_swap.reached_directly(code, names)
            raw |= code_swap.reached(code, code_swap.ATTRIBUTES, attributes)
            if raw:
                raise NotSupported(
                    f"{self.module}.{qualname} uses {sorted(raw)} in a way that cannot be "
                    "redirected, or is not the function that the source file defines. Was it "
                    "changed at run time?",
                    module=self.module,
                )


def _manager_name(qualname: str) -> str:
    """Name of the module global that a function's body calls for its with block."""
    return f"{MARK}within_{qualname.replace('.', '__')}"


@cache
def _definitions(source: ModuleSource) -> tuple[str, ...]:
    """Qualified names of the functions and classes that a module defines, in order, each once."""
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
