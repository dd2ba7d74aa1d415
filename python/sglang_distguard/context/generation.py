"""What the guard reads and writes of SGLang's configuration: one interface, one class per generation.

Generations differ in where SGLang keeps a runner's configuration, and in how it gets there. Code
of the guard that is the same for all of them asks ``current()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Protocol

from sglang_distguard import _core
from sglang_distguard.context.runtime_contexts import RuntimeContexts


class Generation(Protocol):
    """SGLang's configuration of the current scope, unless a method names another scope."""

    def publish(self, server_args: Any, *, world_rank: int, gpu_id: int) -> None:
        """Publish ``server_args``, as SGLang's scheduler process of this rank does."""
        ...

    def published(self) -> Optional[Any]:
        """Return the ``ServerArgs`` that were published last; None if there are none."""
        ...

    def published_in(self, scope: Optional[_core.Scope]) -> Optional[Any]:
        """Return the ``ServerArgs`` published last in ``scope``; None if it has no own ones."""
        ...

    def snapshot(self) -> Any:
        """Return the state of the configuration, for ``restore``."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Set the configuration to what it was."""
        ...

    def device(self) -> str:
        """Return the configured type of device, such as "cpu"."""
        ...

    def memory_fraction(self) -> float:
        """Return the fraction of the device's memory for weights and key-value cache."""
        ...

    def captures_graphs(self) -> bool:
        """Whether the configured runner captures graphs."""
        ...

    def process_settings(self) -> dict[str, bool]:
        """Return the settings that SGLang applies to the whole process, by their name."""
        ...

    def widths(self, names: Sequence[str]) -> dict[str, int]:
        """Return the widths of the groups that the configuration asks for, by their name."""
        ...

    def stamp(self, groups: Mapping[str, Any]) -> None:
        """Record group coordinators, by the name of their field."""
        ...

    def stamped(self, field: str) -> Optional[Any]:
        """Return the coordinator that is recorded as ``field``; None without one."""
        ...

    def keep_stamps(self) -> Callable[[], None]:
        """Return a function that restores what is recorded now."""
        ...

    def clear_stamps(self) -> None:
        """Forget all recorded coordinators."""
        ...


_CURRENT: Generation = RuntimeContexts()


def current() -> Generation:
    """Return the interface to the installed SGLang; so far one class serves all releases."""
    return _CURRENT
