"""The context that code sees: threads, pools, asyncio, activate, use_context, publish, drafts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from conftest import teardown_everything
from runner_calls import in_thread
from sglang_distguard import _core
from sglang_distguard.testing import bit_equal, fleet, server_args, steps

Model = Callable[..., Path]


@pytest.fixture(scope="module")
def two(sglang: None, cache: Path) -> Iterator[tuple[Any, Any]]:
    """Two runners of different models: the first in SGLang's default scope, one in its own."""
    from sglang_distguard.testing import create_model

    sglang_distguard.install()
    runners = tuple(
        sglang_distguard.build_runner(server_args(create_model(name, cache / "models")), name=name)
        for name in ("gpt2", "qwen3_moe")
    )
    yield runners[0], runners[1]
    for runner in runners:
        sglang_distguard.close(runner)
    teardown_everything()
    sglang_distguard.uninstall()


Two = tuple[Any, Any]


def seen_model() -> str:
    """The model whose configuration the running code sees."""
    from sglang.srt.runtime_context import get_model

    return Path(get_model().model_path).name.split("-")[0]


def test_activate_enters_a_runners_scope_in_any_thread(two: Two) -> None:
    gpt2, qwen = two

    def look() -> tuple[str, str, str]:
        before = seen_model()
        with sglang_distguard.activate(qwen):
            inside = seen_model()
            with sglang_distguard.activate(gpt2):
                nested = seen_model()
            assert seen_model() == inside
        assert seen_model() == before
        return before, inside, nested

    assert look() == ("gpt2", "qwen3_moe", "gpt2")
    assert in_thread(look) == ("gpt2", "qwen3_moe", "gpt2")


def test_threads_started_in_a_scope_inherit_it_and_others_do_not(two: Two) -> None:
    _, qwen = two
    with sglang_distguard.activate(qwen):
        assert in_thread(seen_model) == "qwen3_moe"
        assert in_thread(lambda: in_thread(seen_model)) == "qwen3_moe"
    assert in_thread(seen_model) == "gpt2"


def test_a_thread_subclass_that_overrides_run_inherits_too(two: Two) -> None:
    _, qwen = two

    class Worker(threading.Thread):
        def run(self) -> None:
            self.seen = seen_model()

    worker = Worker()
    with sglang_distguard.activate(qwen):
        worker.start()
    worker.join()
    assert worker.seen == "qwen3_moe"
    assert "run" not in vars(worker)


def test_a_pools_tasks_run_in_the_scope_of_the_submitting_code(two: Two) -> None:
    gpt2, qwen = two
    with ThreadPoolExecutor(1) as pool:
        for runner, name in ((qwen, "qwen3_moe"), (gpt2, "gpt2"), (qwen, "qwen3_moe")):
            with sglang_distguard.activate(runner):
                assert pool.submit(seen_model).result() == name
        assert pool.submit(seen_model).result() == "gpt2"


def test_asyncio_tasks_keep_their_own_scope_over_await(two: Two) -> None:
    gpt2, qwen = two

    async def look(runner: Any, name: str, other: asyncio.Event, mine: asyncio.Event) -> None:
        with sglang_distguard.activate(runner):
            mine.set()
            await other.wait()
            assert seen_model() == name
            assert await asyncio.to_thread(seen_model) == name

    async def both() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(
            look(gpt2, "gpt2", first, second), look(qwen, "qwen3_moe", second, first)
        )

    asyncio.run(both())


def test_an_asyncio_server_calls_runners_through_an_executor(two: Two) -> None:
    expected = [steps.generate(runner, activate=sglang_distguard.activate) for runner in two]

    async def serve() -> list[Any]:
        loop = asyncio.get_running_loop()

        def generate(runner: Any) -> Any:
            return steps.generate(runner, activate=sglang_distguard.activate)

        with ThreadPoolExecutor(4) as pool:
            jobs = [loop.run_in_executor(pool, generate, runner) for runner in two]
            return list(await asyncio.gather(*jobs))

    for _ in range(3):
        for result, wanted in zip(asyncio.run(serve()), expected, strict=True):
            assert bit_equal(result.logits, wanted.logits)


def test_a_runners_methods_enter_its_scope_by_themselves(two: Two) -> None:
    _, qwen = two
    assert seen_model() == "gpt2"
    from sglang.srt.runtime_context import get_model

    seen = []
    original = qwen.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(Path(get_model().model_path).name)
        return original(*args, **kwargs)

    qwen.model.forward = forward
    try:
        steps.generate(qwen, steps=0, activate=sglang_distguard.activate)
    finally:
        qwen.model.forward = original
    assert seen == ["qwen3_moe-0"]
    assert seen_model() == "gpt2"


def test_use_context_binds_to_the_calling_thread_only(two: Two, model: Model) -> None:
    from sglang.srt import runtime_context

    context = runtime_context.create_context(server_args(model("opt")), role="scheduler")
    with runtime_context.use_context(context):
        assert seen_model() == "opt"
        assert runtime_context.get_context() is context
        assert runtime_context.get_parallel() is context.parallel
        inside = threading.Event()
        other: list[str] = []
        with _core.run_as(None):
            thread = threading.Thread(target=lambda: (other.append(seen_model()), inside.set()))
            thread.start()
        thread.join()
        assert other == ["gpt2"]
    assert seen_model() == "gpt2"


def test_use_context_of_a_runners_context_is_the_runners_scope(two: Two) -> None:
    from sglang.srt import runtime_context

    _, qwen = two
    with sglang_distguard.activate(qwen):
        context = runtime_context.get_context()
        scope = _core.current_scope()
    with runtime_context.use_context(context):
        assert _core.current_scope() is scope


def test_a_publish_beside_a_living_runner_changes_no_other_context(two: Two, model: Model) -> None:
    from sglang.srt.runtime_context import publish

    def publish_opt() -> str:
        publish(server_args(model("opt")), role="scheduler")
        return seen_model()

    assert in_thread(publish_opt) == "opt"
    assert seen_model() == "gpt2"
    with sglang_distguard.activate(two[1]):
        assert seen_model() == "qwen3_moe"


def test_input_buffers_of_two_runners_share_no_memory(two: Two) -> None:
    import torch
    from sglang.srt.model_executor.input_buffers import share_input_buffer

    pointers = set()
    for runner in two:
        with sglang_distguard.activate(runner):
            first = share_input_buffer("test", torch.zeros(8))
            assert share_input_buffer("test", torch.zeros(8)).data_ptr() == first.data_ptr()
            pointers.add(first.data_ptr())
    assert len(pointers) == 2


def test_flashinfers_kernels_of_two_runners_share_no_scratch_memory(two: Two) -> None:
    """Engines launch on streams of their own, where two kernels may write at the same time."""
    import torch
    from flashinfer import utils

    def scratch(size: int) -> Any:
        return utils._get_cache_buf("softmax_workspace", size, torch.device("cpu"))

    own = []
    for runner in two:
        with sglang_distguard.activate(runner):
            own.append(scratch(64))
            assert scratch(64) is own[-1]
            assert scratch(128) is not own[-1]
            assert [len(utils._cache_buf), len(utils._cache_buf_retired)] == [1, 1]
    assert own[0].data_ptr() != own[1].data_ptr()


def test_a_draft_runner_initialises_nothing_and_lives_in_its_targets_scope(
    two: Two, cache: Path
) -> None:
    _, qwen = two
    (llama,) = fleet.members(cache, [("llama", "float32")])
    last = sglang_distguard.snapshot()["events"][-1]["seq"]

    def build() -> Any:
        return sglang_distguard.build_runner(server_args(llama.model), name="draft", target=qwen)

    draft = in_thread(build)
    # Compared by number, because the event log drops its oldest events.
    since = [event for event in sglang_distguard.snapshot()["events"] if event["seq"] > last]
    assert {event["decision"] for event in since} <= {"lease", "release"}
    with sglang_distguard.activate(draft):
        assert seen_model() == "qwen3_moe"
    expected = steps.generate(qwen, activate=sglang_distguard.activate)
    result = steps.generate(draft, activate=sglang_distguard.activate)
    assert bit_equal(result.logits, llama.alone.logits)
    sglang_distguard.close(draft)
    assert steps.generate(qwen, activate=sglang_distguard.activate).tokens == expected.tokens


def test_activate_refuses_what_was_not_built_under_the_guard() -> None:
    with (
        pytest.raises(TypeError, match="install"),
        sglang_distguard.activate(object()),  # type: ignore[arg-type]
    ):
        pass


def test_a_second_thread_in_forward_of_the_same_runner_is_refused_not_wrong(two: Two) -> None:
    _, qwen = two
    expected = steps.generate(qwen, activate=sglang_distguard.activate)
    inside, leave = threading.Event(), threading.Event()
    original = qwen.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return original(*args, **kwargs)

    qwen.model.forward = slow
    results: list[Any] = []
    first = threading.Thread(
        target=lambda: results.append(
            steps.generate(qwen, steps=0, activate=sglang_distguard.activate)
        ),
        name="first",
    )
    try:
        first.start()
        assert inside.wait(60)
        with pytest.raises(
            sglang_distguard.StateInUse, match="'qwen3_moe' is in a forward of thread first"
        ):
            qwen.forward(forward_batch=None)
    finally:
        leave.set()
        first.join()
        qwen.model.forward = original
    assert bit_equal(results[0].logits, expected.logits[:1])
