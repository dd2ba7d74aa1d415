"""Metrics of several engines in one process: each has its own, in its own registry."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from interpreters import facts_of
from sglang_distguard import Engine, EngineClosed, NotSupported
from sglang_distguard.testing import server_args
from test_engines import GREEDY, MANY

Model = Callable[..., Path]
#: Token ids of one request.
PROMPT = [1, 5, 9]
#: Of the TokenizerManager and of the Scheduler.
PROMPT_TOKENS = "sglang:prompt_tokens_total"
CAPACITY = "sglang:max_total_num_tokens"


def measured(model: Path, name: str, **settings: Any) -> Engine:
    args = server_args(model, enable_metrics=True, sleep_on_idle=True, **settings)
    return Engine(server_args=args, name=name, start_timeout=MANY)


def values(text: str, name: str) -> list[float]:
    """The values of all samples of ``name``."""
    return [float(it.split()[-1]) for it in text.splitlines() if it.startswith(name + "{")]


def registered() -> set[str]:
    """SGLang's metrics in prometheus_client's registry of the process."""
    from prometheus_client import REGISTRY

    return {it.name for it in REGISTRY.collect() if it.name.startswith("sglang")}


def test_each_engine_has_its_own_metrics_and_leaves_none(guard: None, model: Model) -> None:
    before = registered()
    for _ in range(2):  # again where the first ones were
        with measured(model("llama"), "one") as one, measured(model("gpt2"), "two") as two:
            one.generate(input_ids=PROMPT, sampling_params=GREEDY)
            for _ in range(2):
                two.generate(input_ids=PROMPT, sampling_params=GREEDY)
            assert values(one.metrics(), PROMPT_TOKENS) == [3.0]
            assert values(two.metrics(), PROMPT_TOKENS) == [6.0]
            for engine in (one, two):
                text = engine.metrics()
                assert values(text, CAPACITY)[0] > 0
                # Scheduler and TokenizerManager are in two scopes; the text has each name once.
                types = [it for it in text.splitlines() if it.startswith("# TYPE")]
                assert len(types) == len(set(types))
            manager: Any = two.tokenizer_manager
            assert values(sglang_distguard.metrics(manager), PROMPT_TOKENS) == [6.0]
        assert registered() == before
        for thread in threading.enumerate():
            if "monitor)" in thread.name:  # told to end, and not waited for
                thread.join(MANY)
        with pytest.raises(EngineClosed):
            two.metrics()
        assert sglang_distguard.metrics(manager) == ""


def test_without_the_treatment_the_second_engine_is_refused(cache: Path) -> None:
    first, second = facts_of("test_metrics.without(CACHE)")
    assert first == "serving"
    assert "Duplicated timeseries in CollectorRegistry" in second


def without(cache: str) -> None:
    """Print what happens to two engines without ``hooks.metrics``."""
    from sglang_distguard.hooks import generation_0_5_21, metrics, versions
    from sglang_distguard.testing import create_model

    versions.GENERATIONS = {
        "without metrics": lambda: [
            it for it in generation_0_5_21.changes() if it not in metrics.CHANGES
        ]
    }
    sglang_distguard.install()
    facts = []
    for architecture in ("llama", "gpt2"):
        try:
            measured(create_model(architecture, Path(cache) / "models"), architecture)
            facts.append("serving")
        except ValueError as error:
            facts.append(str(error))
    print(json.dumps(facts), flush=True)
    os._exit(0)


def test_two_schedulers_that_one_thread_drives_have_their_own_metrics(cache: Path) -> None:
    first, second = facts_of("test_metrics.driven(CACHE)")
    assert first > 0
    assert second == 2 * first


def driven(cache: str) -> None:
    """Print how many tokens each scheduler has counted; the second one answered twice."""
    import torch
    from sglang_distguard.audit.serving import Scheduler
    from sglang_distguard.testing import create_model

    def ignore(_step: str) -> None: ...

    sglang_distguard.install()
    server = Scheduler()
    runners = []
    for architecture in ("llama", "gpt2"):
        folder = create_model(architecture, Path(cache) / "models")
        args = server_args(folder, **Scheduler.settings)
        runners.append(server.build(args, ignore))
    first, second = runners
    for runner in (first, second, second):
        with torch.inference_mode():
            server.serve(runner, activate=nullcontext, after=ignore)
    decoded = 'sglang:realtime_tokens_total{.*mode="decode".* (.*)'
    counts = [re.findall(decoded, sglang_distguard.metrics(it)) for it in runners]
    print(json.dumps([float(count) for (count,) in counts]), flush=True)
    os._exit(0)


def test_metrics_in_files_of_the_process_are_refused_to_engines(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prometheus_client import values as kept

    monkeypatch.setattr(kept.ValueClass, "_multiprocess", True)
    with pytest.raises(NotSupported, match="files of PROMETHEUS_MULTIPROC_DIR, by name"):
        measured(model("llama"), "one")


def test_a_programs_own_metrics_stay_in_its_registry(guard: None, runner: Any) -> None:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter

    with sglang_distguard.activate(runner):
        own = Counter(
            "own", "of a registry that the program has made", registry=CollectorRegistry()
        )
    mine = Counter("mine", "made outside of every scope")
    with sglang_distguard.activate(runner):
        mine.inc()
    assert REGISTRY.get_sample_value("mine_total") == 1.0
    REGISTRY.unregister(mine)
    assert "own" not in registered()
    assert own is not None


def test_the_metrics_of_other_objects_are_refused(guard: None) -> None:
    with pytest.raises(TypeError, match="resident must be a ModelRunner"):
        sglang_distguard.metrics(object())  # type: ignore[arg-type]
