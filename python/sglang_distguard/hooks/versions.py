"""Choose the hooks for the installed SGLang by what its source defines, not by its version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Optional

from sglang_distguard.errors import NotSupported
from sglang_distguard.hooks import generation_0_5_23
from sglang_distguard.patching import Change, ModulePlan, find_source

#: How to get a release that the guard supports.
INSTALL = "pip install sglang==0.5.23"
#: Generation -> its changes. Newest first: the first generation whose needs are all met is used.
GENERATIONS: dict[str, Callable[[], Sequence[Change]]] = {
    "runtime contexts (sglang 0.5.23)": generation_0_5_23.changes,
}


def installed_version() -> Optional[str]:
    """Return the version of the installed sglang distribution; None if there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def choose() -> list[ModulePlan]:
    """Plan all changes for the installed SGLang, without importing or changing any of it.

    Raises:
        NotSupported: no generation fits; the message says what SGLang lacks for each.
    """
    version = installed_version()
    if find_source("sglang.srt.server_args") is None:
        raise NotSupported(
            f"sglang is not installed in this environment; install it ({INSTALL})",
            sglang=version,
            missing=["sglang"],
        )
    lacking: dict[str, list[str]] = {}
    for generation, changes in GENERATIONS.items():
        plans, missing = _plan(changes())
        if not missing:
            return plans
        lacking[generation] = missing
    reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in lacking.items())
    raise NotSupported(
        f"sglang {version or '(unknown version)'} lacks what the guard needs ({reasons}). "
        "Nothing was patched. Use a version listed in docs/COMPATIBILITY.md, or report this one.",
        sglang=version,
        missing=[name for found in lacking.values() for name in found],
    )


def _plan(changes: Sequence[Change]) -> tuple[list[ModulePlan], list[str]]:
    by_module: dict[str, list[Change]] = {}
    for change in changes:
        by_module.setdefault(change.module, []).append(change)
    plans: list[ModulePlan] = []
    missing: list[str] = []
    for module, wanted in by_module.items():
        source = find_source(module)
        if source is None:
            missing.append(module)
            continue
        plan = ModulePlan(source, wanted)
        try:
            plan.check()
        except NotSupported as error:
            missing.append(str(error))
            continue
        plans.append(plan)
    return plans, missing
