"""Modules made of a text, rewritten as SGLang's are."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_distguard.patching import ModulePlan, Scoped, find_source

Load = Callable[..., tuple[types.ModuleType, ModulePlan]]


@contextmanager
def loader(folder: Path) -> Iterator[Load]:
    """``load(source, *changes)`` is a module made of ``source``, and the applied plan."""
    plans: list[ModulePlan] = []
    names: list[str] = []

    def load(source: str, *names_or_changes: Any) -> tuple[types.ModuleType, ModulePlan]:
        name = f"rewritten_{len(names)}"
        names.append(name)
        file = folder / f"{name}.py"
        file.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        found = find_source(name)
        assert found is not None
        changes = [
            Scoped(name, change) if isinstance(change, str) else change(name)
            for change in names_or_changes
        ]
        plan = ModulePlan(found, changes)
        plans.append(plan)
        plan.check()
        plan.apply(module)
        return module, plan

    yield load
    for plan in plans:
        plan.undo()
    for name in names:
        del sys.modules[name]
