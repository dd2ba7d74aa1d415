"""Captures of graphs among other runners and ranks: alone, or refused."""

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
    """A capture waits for the forwards of this rank, and they for those of ranks that capture already.

    Raises:
        NotSupported: there are several ranks, and their steps take no turns.
    """
    if world.ranks() is not None and handle.turns is None:
        raise NotSupported(
            f"runner '{handle.name}' captures graphs on one of several ranks while others may run "
            'in any order. Build the runners of this process with runner_scope(groups="share"), '
            "whose steps take turns, or without graphs (disable_cuda_graph, no torch.compile)."
        )


@contextmanager
def capture_alone() -> Iterator[None]:
    """Keep runners out while a graph is captured, by whatever code, and wait for those at work.

    Raises:
        NotSupported: there are several ranks, this is in no turn, and other runners live here.
        AcquireTimeout, DeadlockError: see ``phases.phase``.
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
            "a graph is captured outside of the steps that take turns, on one of several ranks, while "
            f"runners live in other scopes ({', '.join(held)}): it would wait for their forwards, and "
            "they may wait for ranks that capture already. Capture before those are built.",
            scopes=held,
        )
    yield
