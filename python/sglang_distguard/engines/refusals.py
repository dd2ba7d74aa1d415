"""Methods of sgl.Engine that an engine of this process has otherwise, or not at all (0.5.23)."""

from __future__ import annotations

from sglang_distguard.errors import NotSupported

#: Methods that have no meaning here, and why.
REFUSED = {
    "get_all_child_pids": "an engine in this process has no child processes",
    "attach_tokenizer_worker": "an engine in this process has one tokenizer, in this process",
    "freeze_gc": "it would keep every object of this process, of other engines, too",
    **dict.fromkeys(
        (
            "init_tokenizer_manager_func",
            "run_detokenizer_process_func",
            "run_scheduler_process_func",
        ),
        "an engine in this process starts its parts itself",
    ),
}
#: Methods that an engine on a CPU does not have, and why.
REFUSED_ON_CPU = dict.fromkeys(
    ("release_memory_occupation", "resume_memory_occupation"),
    "memory is released by torch_memory_saver, which is for GPUs; SGLang's scheduler ends with an "
    "error of CUDA there (0.5.23, `managers/scheduler_components/weight_updater.py:379`)",
)
#: Methods that use one socket, and so run one after another.
ONE_BY_ONE = frozenset(["collective_rpc", "save_remote_model", "save_sharded_model"])
#: Methods that change weights in place, or release them.
CHANGING_WEIGHTS = frozenset(
    [
        "begin_weight_update",
        "end_weight_update",
        "release_memory_occupation",
        "resume_memory_occupation",
        "update_weights_from_disk",
        "update_weights_from_distributed",
        "update_weights_from_ipc",
        "update_weights_from_tensor",
    ]
)


def refuse(name: str, *, engine: str, device: str) -> None:
    """Refuse method ``name`` if an engine does not have it.

    Raises:
        NotSupported: it does not; the message says why.
    """
    if name in REFUSED:
        raise NotSupported(f"Engine.{name} is not supported: {REFUSED[name]}", engine=engine)
    if name in REFUSED_ON_CPU and device == "cpu":
        raise NotSupported(
            f"Engine.{name} is not supported on a CPU: {REFUSED_ON_CPU[name]}", engine=engine
        )
