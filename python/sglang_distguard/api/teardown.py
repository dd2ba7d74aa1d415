"""``teardown``: destroy SGLang's groups and world, so that others can be built."""

from __future__ import annotations

import sys

from sglang_distguard.config.checks import check_flag
from sglang_distguard.distributed import coordinators
from sglang_distguard.distributed.keys import GROUPS, WORLD, all_keys
from sglang_distguard.distributed.teardown import forced, tearing_down
from sglang_distguard.errors import DistGuardError
from sglang_distguard.process.installation import is_installed


def teardown(*, force: bool = False) -> None:
    """Destroy SGLang's groups and world, so that others can be built in this process.

    Adopted state (made by user code) is forgotten and not destroyed. Generation numbers continue.

    Args:
        force: destroy them also while runners hold them. Those runners raise LeaseBroken at their
            next use. A running forward is not stopped: make sure that none runs.

    Raises:
        TypeError: ``force`` is not a bool.
        DistGuardError: ``install()`` was not called.
        StateInUse: runners hold the state (without ``force``; the error lists them), or a thread
            is initialising it or tearing it down. Nothing was changed.
    """
    check_flag("force", force)
    if not is_installed():
        raise DistGuardError("teardown needs the guard: call sglang_distguard.install() first")
    sglang = sys.modules.get("sglang.srt.distributed.parallel_state")
    if sglang is None:  # nothing can have been initialised
        return
    keys = all_keys()
    with forced(force), tearing_down(WORLD, *keys) as (_world, *states):
        for key, state in zip(keys, states, strict=True):
            if key != GROUPS and state.resource is not None:
                coordinators.destroy(state.resource)
        sglang.destroy_model_parallel()
        sglang.destroy_distributed_environment()
