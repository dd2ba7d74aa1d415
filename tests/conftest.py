"""Real SGLang in this process, guarded, and the fleet's reference results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
CACHE = Path(__file__).resolve().parent.parent / ".cache"


@pytest.fixture(scope="session")
def sglang() -> None:
    """SGLang importable on this machine."""
    from sglang_distguard.testing import prepare_environment

    prepare_environment()
    import sglang.srt.model_executor.model_runner  # noqa: F401


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where checkpoints and reference results are kept between runs."""
    return CACHE


@pytest.fixture
def guard(sglang: None) -> Iterator[None]:
    """The guard installed for one test; SGLang torn down and the guard out afterwards."""
    import gc

    import sglang_distguard
    from sglang_distguard import _core

    sglang_distguard.install()
    before = _core.current_scope()
    yield
    _core.adopt_scope(before)
    gc.collect()
    teardown_everything()
    sglang_distguard.uninstall()


def teardown_everything() -> None:
    """Destroy SGLang's groups and world; a test that leaks a runner fails here (StateInUse)."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import reset_context

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    reset_context()


@pytest.fixture
def model(sglang: None, cache: Path) -> object:
    """``model(architecture)`` is the directory of a small checkpoint."""
    from sglang_distguard.testing import create_model

    return lambda architecture, seed=0: create_model(architecture, cache / "models", seed=seed)
