"""The plan of changes to one module: checked against its source, applied, and undone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any, Optional

from sglang_distguard._core import OwnFlag, ScopedGlobal
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import code_swap
from sglang_distguard.patching.applied import Applied
from sglang_distguard.patching.changes import (
    Around,
    AroundMethods,
    Change,
    Raised,
    Reads,
    Replace,
    Scoped,
    Within,
    WithinMethods,
)
from sglang_distguard.patching.instructions import ATTRIBUTES, reached
from sglang_distguard.patching.outline import outline
from sglang_distguard.patching.presence import split
from sglang_distguard.patching.rewrite import Rewrite, rewrite, with_nested
from sglang_distguard.patching.source import ModuleSource
from sglang_distguard.patching.syntax import MARK, accessor_name
from sglang_distguard.patching.with_blocks import Block


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
    def _methods(self) -> list[Within | Around]:
        """What the changes of all methods of a class consist of."""
        found: list[Within | Around] = []
        for change in self.changes:
            if isinstance(change, (AroundMethods, WithinMethods)):
                found += change.expand(outline(self.source))
        return found

    @cached_property
    def _arounds(self) -> list[Around]:
        return [it for it in (*self.changes, *self._methods) if isinstance(it, Around)]

    @cached_property
    def _withins(self) -> list[Within]:
        return [it for it in (*self.changes, *self._methods) if isinstance(it, Within)]

    def check(self) -> None:
        """Raise NotSupported unless the source has what every change needs."""
        missing = sorted({it.name for it in split(self.source, self.changes)[1]})
        if missing:
            raise NotSupported(
                f"{self.module} has no {', '.join(missing)}", module=self.module, missing=missing
            )
        yielding = sorted(
            it.qualname for it in self._withins if it.qualname in outline(self.source).generators
        )
        if yielding:
            raise NotSupported(
                f"{self.module}.{', '.join(yielding)} is a generator function: a with block in it "
                "would stay entered in the code between two items",
                module=self.module,
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

    def read_directly(self) -> None:
        """Give functions that make all their reads at once their own code, until the next scope."""
        for applied in self._applied:
            applied.read_directly({self._rewrite.replaced[it] for it in self._rewrite.early})

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
            raw |= reached(code, ATTRIBUTES, attributes)
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
