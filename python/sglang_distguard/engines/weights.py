"""The weights of an engine: shared with other engines or its own, and the memory of its runners."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Optional, Protocol

from sglang_distguard.config.checks import check_seconds
from sglang_distguard.engines.parts import SCHEDULER, Part, SchedulerPart
from sglang_distguard.errors import EngineFailed, StateInUse
from sglang_distguard.runner import weights
from sglang_distguard.runner.memory import Memory, Storages, storages_of


class _IsEngine(Protocol):
    """What these methods use of an ``Engine``."""

    name: str
    _begun: list[Part]

    def _check(self, *, may_have_failed: bool = False) -> None: ...


class HasWeights:
    """Methods of ``Engine`` that are about weights and memory."""

    def memory(self: _IsEngine) -> Memory:
        """Return how much memory the tensors of this engine take.

        Names in ``shared_with`` are those of engines. An engine that has failed has no tensors.

        Raises:
            EngineClosed: the engine is closed.
        """
        self._check(may_have_failed=True)
        return named_by_engines(storages(self)).memory()

    def detach_weights(self: _IsEngine, *, timeout: Optional[float] = None) -> bool:
        """Give the engine a copy of weights that it shares; see ``sglang_distguard.detach_weights``.

        Args:
            timeout: seconds to wait for a batch that the engine computes now.

        Returns:
            True if weights were copied; False if no other engine shares them.

        Raises:
            EngineFailed, EngineClosed: the engine has failed, or is closed.
            Everything that ``sglang_distguard.detach_weights`` raises.
        """
        self._check()
        seconds = None if timeout is None else check_seconds("timeout", timeout)
        return weights.detach(target_of(self), timeout=seconds)


def source_of(shared: Any) -> Optional[Any]:
    """Return the runner whose weights an engine is to share; None for None.

    Args:
        shared: an engine, or replicas, of which the first one that serves is taken.

    Raises:
        TypeError: it is neither.
        EngineFailed, EngineClosed: it has failed, or is closed.
    """
    if shared is None:
        return None
    first = getattr(shared, "serving", None)  # of replicas
    engine = first() if callable(first) else shared
    if not isinstance(engine, HasWeights):
        raise TypeError(
            f"share_weights_with must be an Engine of sglang_distguard, not {type(shared).__name__}"
        )
    engine._check()  # type: ignore[attr-defined]
    return target_of(engine)  # type: ignore[arg-type]


def target_of(engine: _IsEngine) -> Any:
    """Return the runner of an engine that serves; drafts are others.

    Raises:
        EngineFailed: the engine's scheduler has ended.
    """
    for part in engine._begun:
        manager = part.manager
        if isinstance(part, SchedulerPart) and manager is not None:
            return manager.tp_worker.model_runner
    raise EngineFailed(f"engine {engine.name!r} has no scheduler any more", engine=engine.name)


def refuse_if_shared(engine: _IsEngine, change: str) -> None:
    """Refuse to change weights that other engines share.

    Raises:
        StateInUse: others share them; the remedy is in the message.
    """
    names = _named(weights.others(target_of(engine)))
    if names:
        raise StateInUse(
            f"{change}() would change weights that engine {engine.name!r} shares with "
            f"{', '.join(map(repr, names))}. Close those, or call detach_weights() of this engine "
            "first, which gives it a copy of its own",
            engine=engine.name,
            holders=names,
            step=change,
        )


def storages(engine: _IsEngine) -> Storages:
    """Return the storages of an engine's runners; none if it has ended."""
    managers = [part.manager for part in list(engine._begun) if isinstance(part, SchedulerPart)]
    return storages_of(runner for it in managers if it is not None for runner in _runners(it))


def memory_of_all(engines: Iterable[_IsEngine]) -> Memory:
    """Return the memory of several engines together: what they share counts once.

    ``shared_with`` has the names of all engines that share.
    """
    found = Storages({}, {}, frozenset(), {})
    for engine in engines:
        found = found.joined(storages(engine))
    return named_by_engines(found).memory()


def named_by_engines(found: Storages) -> Storages:
    """Return ``found`` with the names of engines in the place of those of their schedulers."""
    return dataclasses.replace(found, shared_with=frozenset(_named(found.shared_with)))


def _named(names: Iterable[str]) -> list[str]:
    return sorted(it.removesuffix(SCHEDULER) for it in names)


def _runners(scheduler: Any) -> list[Any]:
    workers = (scheduler.tp_worker, getattr(scheduler, "draft_worker", None))
    found = [getattr(it, "model_runner", None) for it in workers]
    for worker in workers:
        # A draft worker may have several runners (0.5.23).
        listed = getattr(worker, "weight_update_runners", None)
        found += [runner for _, runner in listed()] if listed is not None else []
    return [it for it in {id(it): it for it in found}.values() if it is not None]
