"""Plan the hooks for an SGLang by what its source has, not by its version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from sglang_distguard.errors import NotSupported
from sglang_distguard.hooks import generation_0_5_21, releases
from sglang_distguard.hooks.requirements import REQUIRED
from sglang_distguard.patching import (
    Absent,
    Change,
    ModulePlan,
    Needs,
    Scoped,
    find_source,
    is_installed,
    readers,
    split,
)

#: Generation -> its changes. Newest first: the first generation that fits is used.
GENERATIONS: dict[str, Callable[[], Sequence[Change]]] = {
    "runtime contexts (sglang 0.5.21 and later)": generation_0_5_21.changes,
}
#: Packages whose modules may read scoped globals of each other.
_PACKAGES = ("sglang.srt", "sglang.kernels")


@dataclass
class Plan:
    """What would be changed in one SGLang, and what cannot be.

    Attributes:
        release: version of the distribution; None if it is unknown.
        modules: the changes of each module.
        absent: rows and hooks for which this release has nothing. They are dropped. Those that
            only earlier releases need are not listed, and none of a package that is not installed.
        missing: what is required and not there.
        refused: why a global or a function cannot be changed in the form that it has.
    """

    release: Optional[str]
    modules: list[ModulePlan] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    missing: list[Needs] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the guard can work with it."""
        return not self.missing and not self.refused

    @property
    def lost(self) -> list[Absent]:
        """Those of ``absent`` that an earlier release had, and that are not new in a later one.

        Where SGLang has renamed or moved such a global, runners share it now.
        """
        if releases.is_too_old(self.release):
            return []  # all may be new in a later one
        return [it for it in self.absent if releases.has(self.release, it.module, it.name)]

    def warnings(self) -> list[str]:
        """What a user of this SGLang must know, one sentence each."""
        found = []
        sglang = _named(self.release)
        if not releases.is_verified(self.release):
            found.append(
                f"{sglang} is unverified: it has everything that the guard requires, but the guard "
                f"was not tested with it. Verified releases: {', '.join(releases.SUPPORTED)}"
            )
        if self.lost:
            lost = ", ".join(f"{it.module}.{it.name}" for it in sorted(self.lost))
            found.append(
                f"this environment ({sglang}) does not have {lost}, which the guard treats where "
                "it exists. If it was renamed or moved, runners now share it. "
                "`python -m sglang_distguard audit` lists what runners share"
            )
        return found


def _named(release: Optional[str]) -> str:
    return f"sglang {release or '(unknown version)'}"


def choose() -> Plan:
    """Plan all changes for the installed SGLang, without importing or changing any of it.

    Raises:
        NotSupported: SGLang lacks something that is required, or has something that cannot be
            changed. The message names all of it, for each generation.
    """
    release = releases.installed_version()
    if find_source("sglang.srt.server_args") is None:
        raise NotSupported(
            f"sglang is not installed in this environment; install it ({releases.INSTALL})",
            sglang=release,
            missing=["sglang"],
        )
    plans = {name: plan_of(changes(), release) for name, changes in GENERATIONS.items()}
    for plan in plans.values():
        if plan.fits and not releases.is_too_old(release):
            return plan
    raise _refusal(release, plans)


def _refusal(release: Optional[str], plans: dict[str, Plan]) -> NotSupported:
    reasons = "; ".join(f"{name}: {', '.join(why(plan))}" for name, plan in plans.items())
    known = ", ".join(releases.SUPPORTED)
    return NotSupported(
        f"{_named(release)} is not supported: it lacks what the guard needs ({reasons}). Nothing was patched. Supported are {known} ({releases.INSTALL}), and later "
        "releases that have everything",
        sglang=release,
        supported=list(releases.SUPPORTED),
        missing=[f"{it.module}.{it.qualname}" for plan in plans.values() for it in plan.missing],
        refused=[it for plan in plans.values() for it in plan.refused],
    )


def why(plan: Plan) -> list[str]:
    """Why the plan does not fit: everything that is missing or refused."""
    found = [f"{it.module}.{it.qualname} ({it.why})" for it in plan.missing]
    found += plan.refused
    return found or [f"it is older than {releases.SUPPORTED[0]}"]


def plan_of(changes: Iterable[Change], release: Optional[str], at: Optional[Path] = None) -> Plan:
    """Plan ``changes`` for one SGLang from its text alone.

    Args:
        changes: everything that is wanted.
        release: version of that SGLang, if it is known.
        at: a folder with its text, such as an unpacked wheel; default: this environment.
    """
    plan = Plan(release)
    found: dict[str, list[Change]] = {}
    for module, wanted in _by_module([*REQUIRED, *changes]).items():
        needs = [it for it in wanted if isinstance(it, Needs)]
        source = find_source(module, at)
        known = split(source, needs)[0]
        plan.missing += [it for it in needs if it not in known]
        if source is None and not is_installed(module, at):
            continue  # a package that is not there has nothing that runners share
        try:
            found[module], absent = split(
                source, [it for it in wanted if not isinstance(it, Needs)]
            )
        except NotSupported as error:
            plan.refused.append(str(error))
            continue
        plan.absent += [
            it for it in absent if not releases.span_of(it.module, it.name).is_past(release)
        ]
    scoped = {
        module: [it.name for it in present if isinstance(it, Scoped)]
        for module, present in found.items()
    }
    for package in _PACKAGES:
        for read in readers({m: names for m, names in scoped.items() if names}, package, at):
            found.setdefault(read.module, []).append(read)
    for module, present in found.items():
        source = find_source(module, at)
        if source is None or not present:
            continue
        planned = ModulePlan(source, present)
        try:
            planned.check()
        except NotSupported as error:
            plan.refused.append(str(error))
        plan.modules.append(planned)
    return plan


def _by_module(changes: Iterable[Change]) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.module, []).append(change)
    return found
