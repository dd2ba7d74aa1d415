"""Runs ranks as threads of one process: the agreement and a real TCPStore, without SGLang."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sglang_distguard.distributed.ranks.log import Ranks, connect


def serve() -> Any:
    """Start a TCPStore server on a free port of this host; the returned object keeps it alive."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def simulated(size: int, server: Any) -> list[Ranks]:
    """Connect ``size`` ranks, each with its own connections to the store that ``server`` serves."""
    from torch._C._distributed_c10d import TCPStore

    timeout = timedelta(seconds=30)
    return [
        connect(rank, size, TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout))
        for rank in range(size)
    ]
