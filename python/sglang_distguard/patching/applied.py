"""What was done to one module, in a form that can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any, Optional

from sglang_distguard._core import OwnFlag, ScopedGlobal
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import code_swap, module_attributes
from sglang_distguard.patching.rewrite import nested
from sglang_distguard.patching.syntax import MARK

MakeHook = Callable[[Callable[..., Any]], Callable[..., Any]]


class Applied:
    """What was done to one module, in a form that can be undone."""

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
        """The module's code was executed anew in its namespace; what is not there is ours to put."""
        if self._class is not None:
            module_attributes.take_attributes(self.module, self._class)

    def take_over(self, other: Applied) -> None:
        """Undo, in its time, also what is to be undone of another execution of the module."""
        self._restore = {**other._restore, **self._restore}
        self._injected = [*other._injected, *self._injected]

    def inject(self, name: str, value: object, owner: Any = None) -> None:
        """Add ``name`` to the module, or to the class ``owner``."""
        owner = self.module if owner is None else owner
        if name not in vars(owner):  # else it is of an earlier execution of the module
            self._injected.append((owner, name))
        setattr(owner, name, value)

    def give_attributes(self, accessors: Mapping[str, ScopedGlobal]) -> None:
        """See ``modules``."""
        self._class = module_attributes.give_attributes(self.module, accessors)

    def born(self, code: CodeType, codes: Mapping[CodeType, CodeType]) -> CodeType:
        """``code`` of the whole module, with functions that are born as ``codes`` says."""
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
        """Give live functions other code."""
        # Inner functions that do not live yet get the plan's code back, the others their own object.
        self._restore.update({new: old for old, new in codes.items()})
        self._restore.update(code_swap.swap_code(functions, codes))

    def hook(self, function: FunctionType, qualname: str, make: MakeHook) -> None:
        """Let ``function`` call what ``make`` makes of it."""
        if function.__globals__ is not vars(self.module):
            raise NotSupported(f"{qualname} is defined outside {self.module.__name__}")
        original = code_swap.detached(function)
        name = f"{MARK}hook_{qualname.replace('.', '__')}"
        code = code_swap.trampoline(function, name)
        self.inject(name, make(original))
        before = function.__code__
        self._restore[code] = self._restore.get(before, before)
        function.__code__ = code

    def set_attribute(self, name: str, value: object) -> None:
        """Replace an attribute of the module."""
        before = getattr(self.module, name)
        setattr(self.module, name, value)
        self._attributes.append((name, before, value))

    def undo(self, functions: Optional[Sequence[FunctionType]] = None) -> None:
        """Put everything back; ``functions``: of the module, when the caller has looked for them."""
        # Also copies and inner functions made since: all of them carry code of ours.
        code_swap.swap_code(
            code_swap.functions_of(self.module) if functions is None else functions, self._restore
        )
        if self._class is not None:
            module_attributes.take_attributes(self.module, self._class)
        for name, before, ours in reversed(self._attributes):
            # Somebody patched on top: taking ours away would take theirs with it.
            if vars(self.module).get(name) is ours:
                setattr(self.module, name, before)
        # Accessors stay, inert: what is suspended in the middle of a function goes on with its code.
        for owner, name in self._injected:
            if name in vars(owner) and not isinstance(vars(owner)[name], (OwnFlag, ScopedGlobal)):
                delattr(owner, name)
