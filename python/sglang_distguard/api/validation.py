"""Checks of the arguments of ``build_runner``, which are made before anything else."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from sglang_distguard.config.checks import (
    check_flag,
    check_memory,
    check_name,
    check_seconds,
    check_whole,
    shown,
)
from sglang_distguard.distributed.coordinators import default_process_group
from sglang_distguard.errors import NotSupported
from sglang_distguard.runner.handle import handle_of

#: Fields of ServerArgs (0.5.23) that are counts. SGLang divides by some before it checks them. For
#: others it accepts -1, and builds a runner that cannot work.
_COUNTS = (
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "attn_cp_size",
    "moe_dp_size",
    "nnodes",
    "page_size",
    "context_length",
    "max_total_tokens",
    "max_running_requests",
)

#: The largest count that C++ accepts and that can be printed in a message.
_MOST = 2**63 - 1

#: Parameters of ModelRunner that ``build_runner`` sets itself.
_SET_HERE = frozenset(
    {"self", "model_config", "mem_fraction_static", "gpu_id", "nccl_port", "server_args"}
)


def check(
    server_args: object,
    *,
    name: object,
    gpu_id: object,
    nccl_port: object,
    target: object,
    share_weights_with: object,
    timeout: object,
    memory: object,
    options: Mapping[Any, Any],
) -> None:
    """Raise the errors that ``build_runner`` documents for unusable arguments; change nothing."""
    if name is not None:
        check_name(name)
    check_whole("gpu_id", gpu_id, least=0, most=_MOST)
    if nccl_port is not None:
        check_whole("nccl_port", nccl_port, least=1, most=65535)
    if timeout is not None:
        check_seconds("timeout", timeout)
    if memory is not None:
        check_memory("memory", memory)
    _check_server_args(server_args)
    if target is not None:
        handle_of(target, "target").check()
    if share_weights_with is not None:
        handle_of(share_weights_with, "share_weights_with").check()
        if target is not None:
            raise NotSupported(
                "a draft runner does not share weights with another runner: drafts are built with "
                "parts of their own target. Leave out share_weights_with, or target"
            )
    if options:
        _check_options(options, draft=target is not None)


def _check_server_args(server_args: object) -> None:
    # The module is not imported for this: without it no object can be an instance of its class.
    kind = getattr(sys.modules.get("sglang.srt.server_args"), "ServerArgs", None)
    if kind is None or not isinstance(server_args, kind):
        raise TypeError(
            "server_args (or an element of requests) must be a sglang ServerArgs, not "
            f"{shown(server_args)}"
        )
    for count in _COUNTS:
        value = getattr(server_args, count, None)
        if value is not None:
            check_whole(f"server_args.{count}", value, least=1, most=_MOST)
    fraction: object = getattr(server_args, "mem_fraction_static", None)
    if fraction is None:
        return
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"server_args.mem_fraction_static must be a number, not {shown(fraction)}")
    if not 0 < fraction <= 1:
        raise ValueError(
            "server_args.mem_fraction_static must be more than 0 and at most 1, not "
            f"{shown(fraction)}"
        )


def _check_options(options: Mapping[Any, Any], *, draft: bool) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    known = sorted(set(inspect.signature(ModelRunner.__init__).parameters) - _SET_HERE)
    for option in options:
        if option in known:
            continue
        if isinstance(option, str) and option in _SET_HERE:
            raise TypeError(f"option {option!r} is set by build_runner itself")
        close = difflib.get_close_matches(option, known) if isinstance(option, str) else []
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise TypeError(f"option {shown(option)} is not a parameter of ModelRunner; {hint}")
    if "is_draft_worker" in options:
        chosen = check_flag("is_draft_worker", options["is_draft_worker"])
        if draft and not chosen:
            raise ValueError("is_draft_worker must be True with a target, not False (bool)")


def check_ranks(server_args: object) -> None:
    """Refuse a build that would wait for ever, for other ranks that were never started."""
    tp_size, pp_size = (getattr(server_args, width, None) or 1 for width in ("tp_size", "pp_size"))
    ranks = tp_size * pp_size
    if ranks == 1:
        return
    world = default_process_group()
    size = None if world is None else world.size()
    if size == ranks:
        return
    there = "is not initialised" if size is None else f"has {size}"
    raise NotSupported(
        f"server_args asks for {ranks} ranks (tp_size={tp_size}, pp_size={pp_size}) and "
        f"torch.distributed {there} in this process. build_runner starts no other ranks and would "
        "wait for them for ever. Use tp_size=1 and pp_size=1, or call "
        f"torch.distributed.init_process_group in {ranks} processes before.",
        tp_size=tp_size,
        pp_size=pp_size,
        world_size=size,
    )
