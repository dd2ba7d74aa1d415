"""How much memory runners take, counted from their tensors: each storage once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_distguard.runner import weights
from sglang_distguard.runner.tensors import Place, storages_of_model, storages_of_pools


@dataclass(frozen=True)
class Memory:
    """Bytes of the storages of tensors; a storage that several tensors lie in counts once.

    Memory of the interpreter and of libraries is not counted, nor what a forward needs for a while.

    Attributes:
        weights: of models (parameters, buffers, and tensors in attributes of modules), without
            those that are shared.
        shared: of parameters that other runners use, too.
        shared_with: names of those runners, sorted.
        kv_cache: of pools of keys, values, states and requests.
    """

    weights: int
    shared: int
    shared_with: tuple[str, ...]
    kv_cache: int

    @property
    def total(self) -> int:
        """All of it: what would be freed if none of the others shared it."""
        return self.weights + self.shared + self.kv_cache


@dataclass(frozen=True)
class Storages:
    """The storages of some runners, place -> bytes; those of several may be joined."""

    weights: dict[Place, int]
    shared: dict[Place, int]
    shared_with: frozenset[str]
    pools: dict[Place, int]

    def joined(self, other: Storages) -> Storages:
        """Both together."""
        return Storages(
            {**self.weights, **other.weights},
            {**self.shared, **other.shared},
            self.shared_with | other.shared_with,
            {**self.pools, **other.pools},
        )

    def memory(self) -> Memory:
        """Their sizes."""
        own = {place: size for place, size in self.weights.items() if place not in self.shared}
        return Memory(
            sum(own.values()),
            sum(self.shared.values()),
            tuple(sorted(self.shared_with)),
            sum(self.pools.values()),
        )


def storages_of(runners: Iterable[Any]) -> Storages:
    """Return the storages of ``runners`` of one engine, such as a target and its drafts."""
    found = Storages({}, {}, frozenset(), {})
    for runner in runners:
        model = getattr(runner, "model", None)
        places = storages_of_model(model) if model is not None else {}
        names = weights.others(runner)
        sharing = weights.sharing_of(runner) if names else None
        shared = (
            {} if sharing is None else {it: places[it] for it in sharing.places & places.keys()}
        )
        found = found.joined(Storages(places, shared, frozenset(names), storages_of_pools(runner)))
    return found


def bytes_on(device: str, runner: Any) -> int:
    """Return what the tensors of ``runner`` take on devices of this type, without shared weights."""
    found = storages_of([runner])
    own = {place: size for place, size in found.weights.items() if place not in found.shared}
    places = {**own, **found.pools}
    return sum(size for place, size in places.items() if place[0].split(":")[0] == device)


def measure(runners: Iterable[Any]) -> Memory:
    """Return the memory of ``runners``."""
    return storages_of(runners).memory()
