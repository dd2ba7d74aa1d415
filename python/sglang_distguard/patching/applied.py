"""The changes that were made to one module, in a form that can be undone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard._core import OwnFlag, ScopedGlobal
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import code_swap, module_attributes
from sglang_distguard.patching.rewrite import nested
from sglang_distguard.patching.syntax import MARK

MakeHook = Callable[[Callable[..., Any]], Callable[..., Any]]


class Applied:
    """The changes that were made to one module, in a form that can be undone."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self._restore: dict[CodeType, CodeType] = {}
        self._injected: list[tuple[Any, str]] = []
        self._class: Optional[type[ModuleType]] = None
        self._attributes: list[tuple[str, Any, Any]] = []

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Undo everything when the with block fails."""
        try:
            yield
        except BaseException:
            self.undo()
            raise

    def prepare_again(self) -> None:
        """Remove the scoped attributes; the module was executed again, and new ones are added."""
        if self._class is not None:
            module_attributes.take_attributes(self.module, self._class)

    def take_over(self, other: Applied) -> None:
        """Make ``undo`` also undo ``other``, which belongs to another execution of the module."""
        self._restore = {**other._restore, **self._restore}
        self._injected = [*other._injected, *self._injected]

    def inject(self, name: str, value: object, owner: Any = None) -> None:
        """Add ``name`` to the module, or to the class ``owner``."""
        owner = self.module if owner is None else owner
        if name not in vars(owner):  # else an earlier execution of the module injected it
            self._injected.append((owner, name))
        setattr(owner, name, value)

    def give_attributes(self, accessors: Mapping[str, ScopedGlobal]) -> None:
        """Make ``accessors`` attributes of the module (see ``module_attributes``)."""
        self._class = module_attributes.give_attributes(self.module, accessors)

    def born(self, code: CodeType, codes: Mapping[CodeType, CodeType]) -> CodeType:
        """The whole module's ``code``, changed to create its functions with the new ``codes``."""
        consts = list(code.co_consts)
        for index, own in enumerate(consts):
            if isinstance(own, CodeType) and own in codes:
                consts[index] = codes[own]
                self._note_born(own, codes[own])
        return code.replace(co_consts=tuple(consts))

    def _note_born(self, own: CodeType, code: CodeType) -> None:
        self._restore[code] = own
        for inner, changed in zip(nested(own), nested(code), strict=True):
            self._note_born(inner, changed)

    def swap(self, codes: dict[CodeType, CodeType], functions: Sequence[FunctionType]) -> None:
        """Replace the code of live functions."""
        # Undo gives the plan's code to inner functions that are created later, and to all other
        # functions their own code object.
        self._restore.update({new: old for old, new in codes.items()})
        self._restore.update(code_swap.swap_code(functions, codes))

    def hook(self, function: FunctionType, qualname: str, make: MakeHook) -> None:
        """Make ``function`` call the hook that ``make`` returns for it."""
        if function.__globals__ is not vars(self.module):
            raise NotSupported(f"{qualname} is defined outside {self.module.__name__}")
        original = code_swap.detached(function)
        name = f"{MARK}hook_{qualname.replace('.', '__')}"
        code = code_swap.trampoline(function, name)
        self.inject(name, make(original))
        before = function.__code__
        self._restore[code] = self._restore.get(before, before)
        function.__code__ = code

    def read_directly(self, codes: Collection[CodeType]) -> None:
        """Give back their own code to the module's functions that have one of ``codes``.

        Until the next scope (``rust/src/early_reads.rs``). Only functions that the module itself
        names; any other, and a copy that was made before, goes on reading through accessors. A copy
        that other code makes meanwhile (``types.FunctionType``) is not found again.
        """
        for name in {code.co_name for code in codes}:
            function = vars(self.module).get(name)
            if type(function) is FunctionType and function.__globals__ is vars(self.module):
                code = function.__code__
                if code in codes:
                    _core.give_own_code(function, self._restore[code], code)

    def set_attribute(self, name: str, value: Any) -> None:
        """Replace an attribute of the module."""
        before = getattr(self.module, name)
        if before is value:  # the module copied a replacement from another one when it was imported
            before = value.__replaced__
        setattr(self.module, name, value)
        self._attributes.append((name, before, value))

    def undo(self, functions: Optional[Sequence[FunctionType]] = None) -> None:
        """Undo all changes.

        Args:
            functions: the live functions of the module, when the caller has already found them.
        """
        # This includes copies and inner functions made since: all of them have the guard's code.
        code_swap.swap_code(
            code_swap.functions_of(self.module) if functions is None else functions, self._restore
        )
        if self._class is not None:
            module_attributes.take_attributes(self.module, self._class)
        for name, before, ours in reversed(self._attributes):
            # Otherwise other code has patched on top: removing ours would remove its patch, too.
            if vars(self.module).get(name) is ours:
                setattr(self.module, name, before)
        # Accessors stay, inert: a function suspended in its body resumes with the changed code.
        for owner, name in self._injected:
            if name in vars(owner) and not isinstance(vars(owner)[name], (OwnFlag, ScopedGlobal)):
                delattr(owner, name)
