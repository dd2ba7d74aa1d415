"""Real SGLang in this process, guarded, and the fleet's reference results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# torch 2.14.1 looks up the name of every address it connects to: 5 s where a name server is slow.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
#: Against Hugging Face in float32, absolute; logits are of order 1.
CLOSE = 1e-5
#: How often the tests of several ranks do what they do.
TIMES = int(os.environ.get("DISTGUARD_TIMES", "1"))
CACHE = Path(__file__).resolve().parent.parent / ".cache"

#: Ids of scopes that outlived their tests, each told of once.
_TOLD: set[int] = set()


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

    if _core.live_scopes():
        gc.collect()
    # Of an earlier test: a scope that something holds on makes every read slower, for good.
    left = {scope.id: scope.label for scope in _core.live_scopes() if scope.id not in _TOLD}
    _TOLD.update(left)
    assert not left
    sglang_distguard.install()
    with _core.run_as(_core.current_execution()):
        yield
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


@pytest.fixture
def runner(guard: None, model: Callable[..., Path]) -> Iterator[Any]:
    """A runner of a small Llama, named "served"."""
    import sglang_distguard
    from sglang_distguard.testing import server_args

    made = sglang_distguard.build_runner(server_args(model("llama")), name="served")
    yield made
    sglang_distguard.close(made)


@pytest.fixture(scope="session")
def ranks() -> Iterator[object]:
    from sglang_distguard.testing.ranks import RankRunner

    with RankRunner(Path(__file__).parent) as runner:
        yield runner


@pytest.fixture(scope="session")
def alone(ranks: Any) -> Any:
    """``alone(name, size, steps)``: digest of the logits of that runner alone, built by plain SGLang."""
    import rank_programs

    known: dict[Any, str] = {}

    def reference(name: str, size: int = 2, steps: int = 3, **overrides: Any) -> str:
        key = (name, size, steps, repr(overrides))
        if key not in known:
            made = ranks.run(rank_programs.alone, size, name=name, steps=steps, overrides=overrides)
            assert len({it["digest"] for it in made}) == 1
            if rank_programs.RUNNERS[name][1] == "float32":
                assert max(it["error"] for it in made) < CLOSE
            known[key] = made[0]["digest"]
        return known[key]

    return reference


@pytest.fixture
def repeated(ranks: Any) -> Any:
    """``repeated(program, size, ...)``: per repetition what every rank returned (`make ranks`: 50)."""

    def run(program: Any, size: int, **arguments: Any) -> list[list[Any]]:
        import rank_programs

        results = ranks.run(
            rank_programs.repeat,
            size,
            seconds=60.0 + 60.0 * TIMES,
            module=program.__module__,
            program=program.__name__,
            times=TIMES,
            arguments=arguments,
        )
        return [list(result) for result in zip(*results, strict=True)]

    return run
