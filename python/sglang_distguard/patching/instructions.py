"""Which names a code object reaches by which instructions (CPython 3.11 to 3.14)."""

from __future__ import annotations

import dis
from collections.abc import Sequence
from types import CodeType

#: Instructions that reach a global, and an attribute.
GLOBALS = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL")
ATTRIBUTES = ("LOAD_ATTR", "STORE_ATTR", "DELETE_ATTR", "LOAD_METHOD")


def reached(code: CodeType, by: Sequence[str], names: frozenset[str]) -> set[str]:
    """The ``names`` that ``code`` reaches with one of the instructions ``by``."""
    if names.isdisjoint(code.co_names):  # globals and attributes together: only a quick first check
        return set()
    found = dis.get_instructions(code)
    return {it.argval for it in found if it.opname in by and it.argval in names}
