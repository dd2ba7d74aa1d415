"""Access to the scoped globals of patched SGLang modules."""

from __future__ import annotations

import sys
from typing import Optional

from sglang_distguard import _core
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.syntax import accessor_name


def find_accessor(module: str, name: str) -> Optional[_core.ScopedGlobal]:
    """Return the accessor of ``module.name``.

    None if the module is not imported or not patched, or this release has no such global.
    """
    namespace = getattr(sys.modules.get(module), "__dict__", {})
    found: Optional[_core.ScopedGlobal] = namespace.get(accessor_name(name))
    return found


def accessor(module: str, name: str) -> _core.ScopedGlobal:
    """Return the accessor of ``module.name``, which every supported release has.

    Raises:
        NotSupported: the module is not imported or not patched.
    """
    found = find_accessor(module, name)
    if found is None:
        raise NotSupported(
            f"{module}.{name} is not guarded: call sglang_distguard.install() first", module=module
        )
    return found
