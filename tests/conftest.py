"""Fixtures: real SGLang with the guard in this process, small models, and reference results."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# torch 2.14.1 looks up the name of every address it connects to: 5 s where a name server is slow.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
# For tests that are not run by make. OpenMP's threads spin by default while they wait for the next
# operator, which took nine tenths of a small model's processor time (two workers on two cores).
# OpenMP reads this when torch is imported. It changes no bits.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
#: Largest absolute error against Hugging Face in float32; logits are of order 1.
CLOSE = 1e-5
#: Number of repetitions in the tests of several ranks.
TIMES = int(os.environ.get("DISTGUARD_TIMES", "1"))
CACHE = Path(__file__).resolve().parent.parent / ".cache"

#: Files of tests that `make test` leaves out; `make test-KIND` runs them.
KINDS = {
    "audit": (
        "test_audit",
        "test_architectures",
        "test_audit_machines",
        "test_audit_sources",
        "test_audit_values",
        "test_probe",
        "test_unmanaged_globals",
    ),
    "engines": (
        "test_schedulers",
        "test_managers",
        "test_engines",
        "test_engines_at_exit",
        "test_engines_loop",
        "test_engines_methods",
        "test_engines_pooled",
        "test_engines_records",
        "test_engines_weights",
        "test_examples",
        "test_pool",
        "test_process_settings_of_engines",
        "test_replicas",
        "test_serving",
        "test_serving_options",
    ),
    "ranks": (
        "test_ranks",
        "test_ranks_communicators",
        "test_ranks_layouts",
        "test_ranks_turns",
        "test_agreement",
        "test_liveness",
    ),
    "exhaustive": (
        "test_default_dtype_operators",
        "test_interrupts",
        "test_bad_input",
        "test_bad_native_input",
        "test_good_input",
        "test_images_and_sounds",
    ),
}
#: Files that take longest begin first, so that no processor idles at the end.
LONGEST = (
    "test_default_dtype_operators",
    "test_install",
    "test_failing_initialisation",
    "test_references",
    "test_execution",
    "test_graphs",
)

#: Kinds of which each test may run apart from the others of its file, to fill both processors.
APART = ("exhaustive",)

#: Ids of scopes that outlived their tests; each is reported once.
_TOLD: set[int] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by file, and put the longest files first."""
    kind_of = {file: kind for kind, files in KINDS.items() for file in files}
    order: dict[str, int] = {}
    for file in (*LONGEST, *kind_of):
        order.setdefault(file, len(order))
    for item in items:
        if item.path.stem in kind_of:
            item.add_marker(kind_of[item.path.stem])
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one worker run the whole of a file, except for the kinds in ``APART``."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    apart = {file for kind in APART for file in KINDS[kind]}

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if Path(file).stem in apart else file

    return Scheduler(config, log)


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> None:
    import interpreters

    own = tmp_path_factory.getbasetemp()
    interpreters.begin_session(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="session")
def sglang() -> None:
    """Make SGLang importable on this machine."""
    from sglang_distguard.testing import prepare_environment

    prepare_environment()
    import sglang.srt.model_executor.model_runner  # noqa: F401


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where checkpoints and reference results are kept between runs."""
    return CACHE


@pytest.fixture
def code_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which this test's process caches what it makes from SGLang's text."""
    from sglang_distguard.patching import code_cache

    made = tmp_path / "kept"
    monkeypatch.setenv(code_cache.VARIABLE, str(made))
    code_cache._folder.cache_clear()
    yield made
    code_cache._folder.cache_clear()


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """See ``rewritten_modules.loader``."""
    from rewritten_modules import loader

    with loader(tmp_path) as load:
        yield load


@pytest.fixture
def no_scope() -> None:
    """No scope exists; earlier tests left some in reference cycles."""
    from sglang_distguard import _core

    gc.collect()
    assert _core.live_scopes() == []


@pytest.fixture
def guard(sglang: None) -> Iterator[None]:
    """Install the guard for one test; afterwards tear SGLang down and uninstall the guard."""
    with guarded():
        yield


@contextmanager
def guarded() -> Iterator[None]:
    """Install the guard; afterwards tear SGLang down and uninstall the guard."""
    import sglang_distguard
    from sglang_distguard import _core

    # A runner that was closed by force, say: its memory stays promised until it is collected.
    if _core.live_scopes() or _core.promised_memory("cpu"):
        gc.collect()
    # Left by an earlier test: a scope that stays referenced makes every read slower, permanently.
    left = {scope.id: scope.label for scope in _core.live_scopes() if scope.id not in _TOLD}
    _TOLD.update(left)
    assert not left
    sglang_distguard.install()
    with only_new_objects_collected(), _core.run_as(_core.current_execution()):
        yield
        gc.collect()
    teardown_everything()
    sglang_distguard.uninstall()


@contextmanager
def only_new_objects_collected() -> Iterator[None]:
    """Hide the objects that exist now from the garbage collector.

    SGLang 0.5.23 collects garbage several times while it builds a runner. To look through SGLang's
    own modules takes 0.2 s each time, five times as long as the rest of a small runner's build.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def teardown_everything() -> None:
    """Destroy SGLang's groups and world; a test that leaks a runner fails here (StateInUse)."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import reset_context

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    reset_context()


@pytest.fixture(scope="session")
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
    """``alone(name, size, steps)``: digest of that runner's logits, built alone by plain SGLang."""
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
    """``repeated(program, size, ...)``: all ranks' results, per repetition (`make ranks`: 50)."""

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
