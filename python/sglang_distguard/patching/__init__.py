"""Change SGLang's modules and restore them; which changes are made is decided in `hooks`."""

from sglang_distguard.patching.code_swap import is_changed, unscoped_reads
from sglang_distguard.patching.foreign_readers import readers
from sglang_distguard.patching.plan import (
    Around,
    AroundMethods,
    Change,
    ModulePlan,
    Needs,
    Raised,
    Reads,
    Replace,
    Scoped,
    Within,
    WithinMethods,
)
from sglang_distguard.patching.source import ModuleSource, find_source

__all__ = [
    "Around",
    "AroundMethods",
    "Change",
    "ModulePlan",
    "ModuleSource",
    "Needs",
    "Raised",
    "Reads",
    "Replace",
    "Scoped",
    "Within",
    "WithinMethods",
    "find_source",
    "is_changed",
    "readers",
    "unscoped_reads",
]
