"""Whether objects are set aside from the garbage collector (`gc.freeze`)."""

from __future__ import annotations

import gc

#: CPython 3.12 begins with 375 objects of its own set aside, 3.11 and 3.13 with none.
_OF_THE_INTERPRETER = 1000


def is_anything_frozen() -> bool:
    """Whether code of this process has set objects aside, not only the interpreter."""
    return gc.get_freeze_count() > _OF_THE_INTERPRETER
