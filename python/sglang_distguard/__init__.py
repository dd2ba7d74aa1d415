"""Many SGLang ModelRunners in one process: built and run concurrently, correct or refused.

    import sglang_distguard
    sglang_distguard.install()
    # from here on, unchanged SGLang code may build and run ModelRunners from any thread

See README.md; the design is in ARCHITECTURE.md.
"""

# ruff: noqa: E402 - the imports below load the native module

from sglang_distguard.subinterpreters import require_main

require_main()

from sglang_distguard._core import __version__
from sglang_distguard.api.activation import activate
from sglang_distguard.api.building import BuildRequest, BuildResult, build_runner, build_runners
from sglang_distguard.api.closing import close, closing
from sglang_distguard.api.metrics import metrics
from sglang_distguard.api.status import Snapshot, reset, snapshot
from sglang_distguard.api.teardown import teardown
from sglang_distguard.api.turns import turn
from sglang_distguard.api.weights import detach_weights, memory
from sglang_distguard.config.settings import runner_scope
from sglang_distguard.engines.engine import Engine
from sglang_distguard.engines.pool import EngineInfo, Pool
from sglang_distguard.engines.replicas import Replicas
from sglang_distguard.errors import (
    AcquireTimeout,
    AgreementTimeout,
    AmbiguousBuild,
    DeadlockError,
    DistGuardError,
    EngineClosed,
    EngineFailed,
    ForkedError,
    LeaseBroken,
    NotEnoughMemory,
    NotSupported,
    PoisonedState,
    RankFailed,
    RanksDisagree,
    RunnerClosed,
    SpecMismatch,
    StateInUse,
    StoreLost,
    SubinterpreterError,
    UnknownEngine,
)
from sglang_distguard.process import fork_and_exit
from sglang_distguard.process.installation import install, is_installed, uninstall
from sglang_distguard.runner.memory import Memory

__all__ = [
    "AcquireTimeout",
    "AgreementTimeout",
    "AmbiguousBuild",
    "BuildRequest",
    "BuildResult",
    "DeadlockError",
    "DistGuardError",
    "Engine",
    "EngineClosed",
    "EngineFailed",
    "EngineInfo",
    "ForkedError",
    "LeaseBroken",
    "Memory",
    "NotEnoughMemory",
    "NotSupported",
    "PoisonedState",
    "Pool",
    "RankFailed",
    "RanksDisagree",
    "Replicas",
    "RunnerClosed",
    "Snapshot",
    "SpecMismatch",
    "StateInUse",
    "StoreLost",
    "SubinterpreterError",
    "UnknownEngine",
    "__version__",
    "activate",
    "build_runner",
    "build_runners",
    "close",
    "closing",
    "detach_weights",
    "install",
    "is_installed",
    "memory",
    "metrics",
    "reset",
    "runner_scope",
    "snapshot",
    "teardown",
    "turn",
    "uninstall",
]

fork_and_exit.watch()
