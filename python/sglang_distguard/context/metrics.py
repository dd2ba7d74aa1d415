"""prometheus_client: each scope's own registry of metrics, and metrics as text.

SGLang's collectors register themselves with prometheus_client's one registry of the process, which
refuses a second metric of the same name (0.26). Here they register with their scope's own
(``hooks.metrics``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard import _core

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

#: What code of managers and runners has registered in the default scope, where it is in the
#: process's registry, too.
_registry: Optional[CollectorRegistry] = None


def _new() -> CollectorRegistry:
    # Not imported with the package: prometheus_client decides at its import how it keeps values.
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


_of_scope = _core.ScopedGlobal(globals(), "_registry", _new)


def registry() -> CollectorRegistry:
    """The registry of the current scope."""
    found = _of_scope.value
    if found is None:  # the default scope's, the first time
        found = _of_scope.value = _new()
    return found


def families(
    scopes: Iterable[Optional[_core.Scope]], labels: Optional[Mapping[str, str]] = None
) -> list[Metric]:
    """Return the metrics of ``scopes``, those of one name together.

    Args:
        scopes: None is the default one.
        labels: put before the labels of each sample.
    """
    found: list[Metric] = []
    for scope in dict.fromkeys(scopes):
        own = _of_scope.value_in(scope)
        if own is not None:
            found += own.collect()
    for family in found:
        family.samples = [
            it._replace(labels={**(labels or {}), **it.labels}) for it in family.samples
        ]
    return together(found)


def together(found: Iterable[Metric]) -> list[Metric]:
    """Return ``found`` with the samples of metrics of one name in one family, as the text needs."""
    by_name: dict[str, Metric] = {}
    for family in found:
        first = by_name.setdefault(family.name, family)
        if first is not family:
            first.samples += family.samples
    return list(by_name.values())


def text(found: Iterable[Metric]) -> str:
    """Return ``found`` in Prometheus's text format."""
    from prometheus_client import generate_latest

    return generate_latest(_Found(found)).decode()


class _Found:
    """Metrics as a collector, which ``generate_latest`` takes."""

    def __init__(self, found: Iterable[Metric]) -> None:
        self._found = list(found)

    def collect(self) -> list[Any]:
        return self._found
