"""SGLang 0.5.21 and later: a RuntimeContext holds configuration, flags, resources and groups.

``hooks.requirements`` lists every name of SGLang that is used here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context import environment
from sglang_distguard.context.accessors import accessor
from sglang_distguard.patching.syntax import accessor_name

MODULE = "sglang.srt.runtime_context"
_CONTEXTS = accessor_name("_CONTEXT")


class RuntimeContexts:
    """The ``Generation`` of these releases.

    Only ``published``, ``published_in`` and ``snapshot`` need the guard to be installed.
    """

    def publish(self, server_args: Any, *, world_rank: int, gpu_id: int) -> None:
        from sglang.srt.runtime_context import SpawnRanks, publish

        ranks = SpawnRanks(world_rank=world_rank, gpu_id=gpu_id)
        publish(server_args, role="scheduler", ranks=ranks)

    def published(self) -> Optional[Any]:
        module = sys.modules.get(MODULE)
        contexts = None if module is None else vars(module).get(_CONTEXTS)
        return None if contexts is None else contexts.value._server_args

    def published_in(self, scope: Optional[_core.Scope]) -> Optional[Any]:
        contexts = accessor(MODULE, "_CONTEXT")
        if scope is not None and not contexts.is_set_in(scope):
            return None
        return contexts.value_in(scope)._server_args

    def snapshot(self) -> dict[str, Any]:
        snapshot = vars(sys.modules[MODULE])["snapshot_context"]()
        # 0.5.23 keeps the stamp itself and writes into it afterwards.
        parallel = snapshot.get("__parallel__", {})
        if "_stamp" in parallel:
            parallel["_stamp"] = dict(parallel["_stamp"])
        return snapshot

    def restore(self, snapshot: dict[str, Any]) -> None:
        vars(sys.modules[MODULE])["restore_context"](snapshot)

    def device(self) -> str:
        from sglang.srt.runtime_context import get_device

        return get_device().device

    def memory_fraction(self) -> float:
        from sglang.srt.runtime_context import get_schedule

        return get_schedule().mem_fraction_static

    def captures_graphs(self) -> bool:
        """As `cuda_graph_setup` decides (0.5.23)."""
        from sglang.srt.model_executor.cuda_graph_config import (
            Backend,
            Phase,
            check_cuda_graph_backend,
        )
        from sglang.srt.runtime_context import get_flags

        if self.device() == "cpu":
            return get_flags().capture.enable_torch_compile
        of_graphs = (Phase.PREFILL, Phase.DECODE)
        return not all(check_cuda_graph_backend(phase, Backend.DISABLED) for phase in of_graphs)

    def process_settings(self) -> dict[str, bool]:
        from sglang.srt.runtime_context import get_exec

        execution = get_exec()
        return {
            "enable_deterministic_inference": bool(
                execution.deterministic.enable_deterministic_inference
            ),
            "enable_tf32_matmul": bool(execution.features.enable_tf32_matmul),
            "enable_p2p_check": bool(self._parallel.enable_p2p_check),
        }

    def widths(self, names: Sequence[str]) -> dict[str, int]:
        return {name: getattr(self._parallel, name) for name in names}

    def stamp(self, groups: Mapping[str, Any]) -> None:
        self._parallel.override_permanently(**groups)

    def stamped(self, field: str) -> Optional[Any]:
        return self._parallel._stamp.get(field)

    def keep_stamps(self) -> Callable[[], None]:
        parallel, stamp = self._parallel, dict(self._parallel._stamp)

        def restore() -> None:
            parallel._stamp = stamp

        return restore

    def clear_stamps(self) -> None:
        self._parallel.clear_stamp()

    @property
    def _parallel(self) -> Any:
        from sglang.srt.runtime_context import get_parallel

        return get_parallel()


def scope_of_context(context: Any) -> Optional[_core.Scope]:
    """Return the scope whose RuntimeContext is ``context``; None for SGLang's default scope.

    A context that no scope has yet (made by ``create_context``) gets a new scope.
    """
    contexts = accessor(MODULE, "_CONTEXT")
    if contexts.value_in(None) is context:
        return None
    for scope in _core.live_scopes():
        if contexts.is_set_in(scope) and contexts.value_in(scope) is context:
            return scope
    scope = _core.new_scope(f"context-{id(context):x}")
    contexts.set_value_in(scope, context)
    accessor(MODULE, "_PARALLEL").set_value_in(scope, context.parallel)
    environment.adopt(scope, environment.written_by(context._server_args))
    return scope
