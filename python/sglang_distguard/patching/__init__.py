"""Change SGLang's modules and restore them; which changes are made is decided in `hooks`."""

from sglang_distguard.patching.changes import (
    Around,
    AroundMethods,
    Change,
    Needs,
    Raised,
    Reads,
    Replace,
    Scoped,
    Within,
    WithinMethods,
    name_of,
)
from sglang_distguard.patching.code_swap import is_changed, unscoped_reads
from sglang_distguard.patching.foreign_readers import readers
from sglang_distguard.patching.outline import outline
from sglang_distguard.patching.plan import ModulePlan
from sglang_distguard.patching.presence import Absent, split
from sglang_distguard.patching.source import ModuleSource, find_source, is_installed

__all__ = [
    "Absent",
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
    "is_installed",
    "name_of",
    "outline",
    "readers",
    "split",
    "unscoped_reads",
]
