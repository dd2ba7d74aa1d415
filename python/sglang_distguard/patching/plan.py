"""What is to be changed in one module, checked against its source, applied to it and undone."""

from __future__ import annotations

import ast
import dis
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any, Optional, Union

from sglang_distguard._core import ScopedGlobal
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import live
from sglang_distguard.patching.rewrite import Rewrite, rewrite
from sglang_distguard.patching.source import ModuleSource
from sglang_distguard.patching.syntax import accessor_name

MakeHook = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Scoped:
    """Every scope has its own value of a module global or class attribute (see ``treatments``)."""

    module: str
    name: str


@dataclass(frozen=True)
class Reads:
    """``module`` may read ``of``.``name``, scoped elsewhere (``of`` may be "module.Class"): the scope's."""

    module: str
    of: str
    name: str


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
class Needs:
    """``module``.``qualname`` must be defined: a hook uses it."""

    module: str
    qualname: str


Change = Union[Scoped, Reads, Around, AroundMethods, Replace, Needs]


@dataclass
class ModulePlan:
    """The changes of one module. Planned from source, before anything is imported or touched.

    Raises (from ``check``):
        NotSupported: the source lacks something a change needs.
    """

    source: ModuleSource
    changes: Sequence[Change]
    _applied: Optional[_Applied] = field(default=None, init=False)

    @property
    def module(self) -> str:
        return self.source.module

    @cached_property
    def _rewrite(self) -> Rewrite:
        names = frozenset(self._scoped_names)
        reads = ((it.of, it.name) for it in self.changes if isinstance(it, Reads))
        elsewhere = frozenset(reads)
        return rewrite(self.source, names, elsewhere) if names or elsewhere else Rewrite({}, {})

    @property
    def _scoped_names(self) -> list[str]:
        return [change.name for change in self.changes if isinstance(change, Scoped)]

    @cached_property
    def _defined(self) -> tuple[str, ...]:
        return _definitions(self.source)

    @cached_property
    def _arounds(self) -> list[Around]:
        found = [change for change in self.changes if isinstance(change, Around)]
        for change in self.changes:
            if isinstance(change, AroundMethods):
                prefix = change.classname + "."
                names = [
                    name.removeprefix(prefix) for name in self._defined if name.startswith(prefix)
                ]
                found += change.expand(names)
        return found

    def check(self) -> None:
        """Raise NotSupported unless the source has what every change needs."""
        wanted = [change.qualname for change in self._arounds]
        wanted += [change.qualname for change in self.changes if isinstance(change, Needs)]
        wanted += [change.classname for change in self.changes if isinstance(change, AroundMethods)]
        missing = sorted(set(wanted) - set(self._defined))
        if missing:
            raise NotSupported(
                f"{self.module} has no {', '.join(missing)}", module=self.module, missing=missing
            )
        _ = self._rewrite

    def apply(self, module: ModuleType, functions: Optional[Sequence[FunctionType]] = None) -> None:
        """Change the imported ``module``; nothing happens when that is done already.

        Args:
            module: the module itself.
            functions: its live functions, when the caller has looked for them already.
        """
        if self._applied is not None:
            return
        applied = _Applied(module)
        try:
            if self._rewrite.replaced or self._scoped_names:
                found = live.functions_of(module) if functions is None else functions
                self._apply_rewrite(applied, found)
            for change in self._arounds:
                function = live.resolve_function(module, change.qualname)
                applied.hook(function, change.qualname, change.make)
            for change in self.changes:
                if isinstance(change, Replace):
                    applied.set_attribute(change.name, change.make(getattr(module, change.name)))
        except BaseException:
            applied.undo()
            raise
        self._applied = applied

    def undo(self, functions: Optional[Sequence[FunctionType]] = None) -> None:
        """Put everything back; nothing happens when nothing was applied."""
        applied, self._applied = self._applied, None
        if applied is not None:
            applied.undo(functions)

    @property
    def applied_to(self) -> Optional[ModuleType]:
        """The module that is changed now."""
        return None if self._applied is None else self._applied.module

    def _apply_rewrite(self, applied: _Applied, functions: Sequence[FunctionType]) -> None:
        plan = self._rewrite
        namespace = vars(applied.module)
        for name in self._scoped_names:
            initial = eval(plan.initials[name], namespace)
            *path, last = name.split(".")
            owner: Any = applied.module
            for part in path:
                owner = getattr(owner, part)
            accessor = ScopedGlobal(owner if path else namespace, last, initial)
            applied.inject(accessor_name(last), accessor, owner)
        applied.swap(plan.replaced, functions)
        self._check_no_raw_access(functions)

    def _check_no_raw_access(self, functions: Sequence[FunctionType]) -> None:
        """No live function may still reach a scoped global directly: it would see another runner's.

        Fails when the running code is not what the source on disk says, and for an attribute that
        is reached in another way than through its class (``self.X``).
        """
        names = frozenset(name for name in self._scoped_names if "." not in name)
        attributes = frozenset(
            name.rpartition(".")[2] for name in self._scoped_names if "." in name
        )
        for function in functions:
            raw = _reached(function.__code__, _GLOBALS, names)
            raw |= _reached(function.__code__, _ATTRIBUTES, attributes)
            if raw:
                raise NotSupported(
                    f"{self.module}.{function.__qualname__} uses {sorted(raw)} in a way that cannot be "
                    "redirected, or is not the function that the source file defines; was it changed at "
                    "run time?",
                    module=self.module,
                )


class _Applied:
    """What was done to one module, in a form that can be undone."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self._restore: dict[CodeType, CodeType] = {}
        self._injected: list[tuple[Any, str]] = []
        self._signed: list[FunctionType] = []
        self._attributes: list[tuple[str, Any, Any]] = []

    def inject(self, name: str, value: object, owner: Any = None) -> None:
        """Add ``name`` to the module, or to the class ``owner``."""
        owner = self.module if owner is None else owner
        setattr(owner, name, value)
        self._injected.append((owner, name))

    def swap(self, codes: dict[CodeType, CodeType], functions: Sequence[FunctionType]) -> None:
        # Inner functions that do not live yet get the plan's code back, the others their own object.
        self._restore.update({new: old for old, new in codes.items()})
        self._restore.update(live.swap_code(functions, codes))

    def hook(self, function: FunctionType, qualname: str, make: MakeHook) -> None:
        if function.__globals__ is not vars(self.module):
            raise NotSupported(f"{qualname} is defined outside {self.module.__name__}")
        original = live.detached(function)
        name = f"_distguard_hook_{qualname.replace('.', '__')}"
        code = live.trampoline(function, name)
        self.inject(name, make(original))
        if not hasattr(function, "__signature__"):
            # The trampoline takes anything; what the caller may give is still SGLang's to say.
            function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
            self._signed.append(function)
        before = function.__code__
        self._restore[code] = self._restore.get(before, before)
        function.__code__ = code

    def set_attribute(self, name: str, value: object) -> None:
        before = getattr(self.module, name)
        setattr(self.module, name, value)
        self._attributes.append((name, before, value))

    def undo(self, functions: Optional[Sequence[FunctionType]] = None) -> None:
        # Also copies and inner functions made since: all of them carry code of ours.
        live.swap_code(
            live.functions_of(self.module) if functions is None else functions, self._restore
        )
        for function in self._signed:
            vars(function).pop("__signature__", None)
        for name, before, ours in reversed(self._attributes):
            # Somebody patched on top: taking ours away would take theirs with it.
            if vars(self.module).get(name) is ours:
                setattr(self.module, name, before)
        for owner, name in self._injected:
            if name in vars(owner):
                delattr(owner, name)


_GLOBALS = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL")
_ATTRIBUTES = ("LOAD_ATTR", "STORE_ATTR", "DELETE_ATTR", "LOAD_METHOD")


def _reached(code: CodeType, by: Sequence[str], names: frozenset[str]) -> set[str]:
    """Those of ``names`` that ``code`` reaches by one of the instructions ``by``."""
    if names.isdisjoint(code.co_names):  # holds globals and attributes, so only a first look
        return set()
    found = dis.get_instructions(code)
    return {it.argval for it in found if it.opname in by and it.argval in names}


@cache
def _definitions(source: ModuleSource) -> tuple[str, ...]:
    """Qualified names of the functions and classes a module defines, in order, each once."""
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
