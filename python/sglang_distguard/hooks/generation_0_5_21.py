"""SGLang 0.5.21 and later: a RuntimeContext holds configuration, flags, resources and groups."""

from __future__ import annotations

from sglang_distguard.hooks import (
    bootstrap,
    caches,
    daemon_threads,
    environ,
    expert_location,
    free_memory,
    given_runners,
    graph_captures,
    host,
    managers,
    memory_saver,
    metrics,
    model_config,
    model_loader,
    model_runner,
    ngram_corpus,
    parallel_state,
    patch_torch,
    process_globals,
    process_groups,
    runtime_context,
    server_args,
    source_patcher,
    starts,
    threads,
    torch_compiler,
    torch_dtype,
    torch_module,
    torch_profiler,
    transformers_models,
    unittest_mock,
    weight_files,
    weight_updater,
)
from sglang_distguard.patching import Change, Scoped

HOOKS = (
    runtime_context,
    parallel_state,
    patch_torch,
    process_groups,
    bootstrap,
    caches,
    environ,
    server_args,
    starts,
    expert_location,
    model_config,
    free_memory,
    model_runner,
    managers,
    host,
    daemon_threads,
    metrics,
    ngram_corpus,
    graph_captures,
    given_runners,
    model_loader,
    weight_files,
    weight_updater,
    memory_saver,
    torch_compiler,
    torch_dtype,
    torch_module,
    torch_profiler,
    transformers_models,
    threads,
    unittest_mock,
    source_patcher,
)


def changes() -> list[Change]:
    """Return all changes of this generation."""
    found: list[Change] = [
        Scoped(module, name) for module, names in process_globals.scoped().items() for name in names
    ]
    for hook in HOOKS:
        found.extend(hook.CHANGES)
    return found
