"""The content of the registry as typed plain data, and ``reset``, which clears poisoned state."""

from __future__ import annotations

from typing import Any, Literal, Optional, TypedDict, cast

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.config.checks import check_flag
from sglang_distguard.process.installation import is_installed
from sglang_distguard.runner import pinned_loads


class ActorInfo(TypedDict):
    """A thread, and the runner that it builds."""

    thread: int
    thread_name: str
    runner: Optional[str]


class HolderInfo(TypedDict):
    """The holder of a lease; ``since`` is in seconds on the registry's clock."""

    name: str
    thread_name: str
    since: float


class SlotInfo(TypedDict):
    """One piece of shared state."""

    key: str
    state: Literal["idle", "running", "teardown", "ready", "poisoned"]
    generation: int
    waiters: int
    failures: int
    last_failure: Optional[str]
    by: Optional[ActorInfo]
    since: Optional[float]
    spec: dict[str, Any]
    origin: Optional[Literal["created", "adopted"]]
    reason: Optional[str]
    holders: list[HolderInfo]


class EventInfo(TypedDict):
    """One decision of the registry; ``at`` and ``waited`` are in seconds."""

    seq: int
    at: float
    key: str
    actor: ActorInfo
    decision: str
    generation: int
    waited: float
    detail: str


class VisitInfo(TypedDict):
    """A thread that has been inside a phase, or has waited for it, since ``since``."""

    phase: str
    step: Optional[str]
    by: ActorInfo
    inside: bool
    since: float


class RunnerScopeInfo(TypedDict):
    """A live scope; ``runners`` is the number of live runners in it."""

    id: int
    label: str
    runners: int


class PinnedFileInfo(TypedDict):
    """A file of weights that is registered with CUDA now; ``users`` is the number of its loads."""

    path: str
    bytes: int
    users: int


class Snapshot(TypedDict):
    """The process's shared state at one moment; JSON-able.

    ``not_pinned`` says why files of weights are no longer registered with CUDA, if that has failed.
    """

    at: float
    installed: bool
    reuse: bool
    timeout: float
    slow_after: float
    agreement_timeout: float
    groups: str
    pinned_loads: bool
    streams: str
    slots: list[SlotInfo]
    phases: list[VisitInfo]
    scopes: list[RunnerScopeInfo]
    pinned_files: list[PinnedFileInfo]
    not_pinned: Optional[str]
    events: list[EventInfo]
    dropped_events: int


def snapshot() -> Snapshot:
    """Return the initialised state, its initialising threads, its holders, and the last decisions.

    Takes one short lock and changes nothing. Works also without ``install()``.
    """
    chosen = settings.current()
    facts: dict[str, Any] = _core.snapshot()
    scopes = [
        RunnerScopeInfo(id=scope.id, label=scope.label, runners=_core.live_runners(scope))
        for scope in _core.live_scopes()
    ]
    pinned = [
        PinnedFileInfo(path=path, bytes=size, users=users)
        for path, size, users in pinned_loads.FILES.now()
    ]
    return cast(
        Snapshot,
        {
            **facts,
            "installed": is_installed(),
            "reuse": chosen.reuse,
            "timeout": chosen.timeout,
            "slow_after": chosen.slow_after,
            "agreement_timeout": chosen.agreement_timeout,
            "groups": chosen.groups,
            "pinned_loads": chosen.pinned_loads,
            "streams": chosen.streams,
            "scopes": scopes,
            "pinned_files": pinned,
            "not_pinned": pinned_loads.refused(),
        },
    )


def reset(*, force: bool = False) -> None:
    """Forget all registered state, also poisoned state; the next request examines it again.

    Nothing is destroyed. A world or groups that still exist are adopted at the next request, and
    other state is initialised again.

    Args:
        force: forget the state also while runners hold leases. Those runners raise LeaseBroken at
            their next use.

    Raises:
        TypeError: ``force`` is not a bool.
        StateInUse: runners hold state (without ``force``), or a thread is initialising state.
    """
    _core.reset(force=check_flag("force", force))
