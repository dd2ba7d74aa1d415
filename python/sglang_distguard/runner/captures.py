"""Captures of graphs beside other runners and ranks: they run alone, or they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sglang_distguard import _core
from sglang_distguard.distributed import world
from sglang_distguard.distributed.ranks import agreement
from sglang_distguard.errors import (
    NotSupported,
)
from sglang_distguard.sync.phases import in_phase


def refuse_capture_without_turns(handle: _core.RunnerHandle) -> None:
    """Refuse a capture of a runner whose steps take no turns, in a world of several ranks.

    It would wait for the forwards of this rank, and those may wait for ranks that capture already.

    Raises:
        NotSupported: there are several ranks, and the runner's steps take no turns.
    """
    if world.ranks() is not None and handle.turns is None:
        raise NotSupported(
            f"runner '{handle.name}' captures graphs on one of several ranks while other runners "
            "may run in any order. Build the runners of this process with "
            'runner_scope(groups="share"), whose steps take turns, or without graphs '
            "(disable_cuda_graph, no torch.compile)."
        )


@contextmanager
def capture_alone() -> Iterator[None]:
    """Wait for running steps, and keep all runners out while any code captures a graph.

    Raises:
        NotSupported: there are several ranks, the running code is in no turn, and runners live in
            other scopes.
        AcquireTimeout, DeadlockError: see ``phases.in_phase``.
    """
    if world.ranks() is None or agreement.has_turn():
        with in_phase("capture"):
            yield
        return
    here = _core.current_scope()
    others = [scope for scope in (None, *_core.live_scopes()) if scope is not here]
    held = [scope.label if scope else "(default)" for scope in others if _core.live_runners(scope)]
    if held:
        raise NotSupported(
            "a graph is captured outside of the steps that take turns, on one of several ranks, "
            f"while runners live in other scopes ({', '.join(held)}). It would wait for their "
            "forwards, and those may wait for ranks that capture already. Capture before those "
            "runners are built.",
            scopes=held,
        )
    yield
