"""prometheus_client: collectors that a scope's code makes register with the scope's own registry.

prometheus_client 0.26 refuses a second collector of the same name in one registry, and SGLang's
collectors are for one engine per process (0.5.23). In the default scope they register as in plain
SGLang; those of a manager end with it, so that another one may follow there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core
from sglang_distguard.context import metrics
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import Around

_MODULE = "prometheus_client.registry"


def _is_of_process(registry: Any) -> bool:
    """Whether ``registry`` is that of the process, and more than its own collectors register."""
    package = sys.modules["prometheus_client"]
    # Its import registers collectors of the process, whatever code imports it first.
    is_imported = not getattr(package.__spec__, "_initializing", False)
    return is_imported and registry is sys.modules[_MODULE].__dict__["REGISTRY"]


def _register(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def register(self: Any, collector: Any) -> None:
        execution = _core.current_execution()
        if execution is None or not _is_of_process(self):
            original(self, collector)
        elif execution.scope is not None:
            _refuse_files(execution.scope)
            metrics.registry().register(collector)
        else:
            original(self, collector)
            handle = execution.runner
            if handle is not None:
                own = metrics.registry()
                own.register(collector)
                if handle.manager:
                    handle.keep_part(functools.partial(_remove, collector, self, own))

    return register


def _remove(collector: Any, *registries: Any) -> None:
    for registry in registries:
        if collector in registry._collector_to_names:  # a program may have removed it
            registry.unregister(collector)


def _unregister(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def unregister(self: Any, collector: Any) -> None:
        if _core.current_scope() is not None and _is_of_process(self):
            own = metrics.registry()
            if collector in own._collector_to_names:
                own.unregister(collector)
                return
        original(self, collector)

    return unregister


def _refuse_files(scope: _core.Scope) -> None:
    """Refuse metrics whose values are in files by name and labels, whichever registry has them."""
    from prometheus_client import values

    if getattr(values.ValueClass, "_multiprocess", False):
        raise NotSupported(
            f"metrics of {scope.label!r}: prometheus_client keeps all values of this process in the "
            "files of PROMETHEUS_MULTIPROC_DIR, by name, so that engines would overwrite each "
            "other's. Unset the variable before prometheus_client is imported, or use "
            "enable_metrics=False",
            scope=scope.label,
        )


CHANGES = (
    Around(_MODULE, "CollectorRegistry.register", _register),
    Around(_MODULE, "CollectorRegistry.unregister", _unregister),
)
