"""Make scoped globals ordinary attributes of their module for code outside the module.

Functions of the module reach a scoped global through its accessor. Other code reads, writes or
deletes it as an attribute: ``m.X = 1``, ``getattr``, ``from m import X``, ``mock.patch.object``.
Both mean the value in the running code's scope, and outside of every runner the value in SGLang's
default scope. The module gets a subclass of its class, with a data descriptor for each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Optional

from sglang_distguard._core import ScopedGlobal


class _Attribute:
    """One scoped global as an attribute of its module."""

    def __init__(self, name: str, accessor: ScopedGlobal) -> None:
        self._name = name
        self._accessor = accessor

    def __get__(self, module: Optional[ModuleType], owner: Any = None) -> Any:
        if module is None:
            return self
        try:
            return self._accessor.value
        except NameError as error:
            raise self._missing(module) from error

    def __set__(self, module: ModuleType, value: Any) -> None:
        self._accessor.value = value

    def __delete__(self, module: ModuleType) -> None:
        try:
            del self._accessor.value
        except NameError as error:
            raise self._missing(module) from error

    def _missing(self, module: ModuleType) -> AttributeError:
        return AttributeError(
            f"module {module.__name__!r} has no attribute {self._name!r}",
            name=self._name,
            obj=module,
        )


class WithScopedAttributes(ModuleType):
    """Common base of these subclasses, for ``isinstance`` checks."""


def give_attributes(module: ModuleType, accessors: Mapping[str, ScopedGlobal]) -> type[ModuleType]:
    """Make ``accessors``, by name, attributes of ``module``, and return its former class."""
    before = type(module)
    attributes: dict[str, Any] = {
        name: _Attribute(name, accessor) for name, accessor in accessors.items()
    }
    attributes["__module__"] = before.__module__
    module.__class__ = type(before.__name__, (WithScopedAttributes, before), attributes)
    return before


def take_attributes(module: ModuleType, before: type[ModuleType]) -> None:
    """Restore the class of ``module`` to ``before``, unless other code has changed it since."""
    if issubclass(type(module), WithScopedAttributes) and before in type(module).__mro__:
        module.__class__ = before
