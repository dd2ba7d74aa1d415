"""Captures outside the runner's methods are alone in the process, too.

SGLang's and torch's context managers are real; only their calls of CUDA do nothing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_distguard
from references import reference
from registry_calls import in_line, inside, run_in_threads, until
from sglang_distguard import _core
from sglang_distguard.distributed import world
from sglang_distguard.errors import DeadlockError, NotSupported
from sglang_distguard.hooks import generation_0_5_21, graph_captures, versions
from sglang_distguard.runner.handle import handle_of
from sglang_distguard.sync.phases import in_phase
from sglang_distguard.testing import bit_equal, generate, server_args

Model = Callable[[str], Path]


@pytest.fixture
def cuda(sglang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the parts of CUDA that the context managers of captures call."""
    import torch
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        breakable_cuda_graph as breakable,
    )
    from torch.cuda import _graph_annotations

    for owner, name in (
        (torch.cuda, "synchronize"),
        (torch.cuda, "empty_cache"),
        (torch.cuda, "current_stream"),
        (torch._C, "_host_emptyCache"),
        (_graph_annotations, "maybe_stamp_capture_root"),
        (breakable.BreakableCUDAGraphCapture, "_begin_new_segment"),
        (breakable.BreakableCUDAGraphCapture, "_end_current_segment"),
    ):
        monkeypatch.setattr(owner, name, lambda *_args: None, raising=False)


def cuda_graph(**options: Any) -> Any:
    import torch

    nothing = SimpleNamespace(
        capture_begin=lambda *_args, **_options: None, capture_end=lambda: None
    )
    stream = SimpleNamespace(device=torch.device("cpu"))
    return torch.cuda.graph(nothing, stream=stream, **options)  # type: ignore[arg-type]


def breakable_graph() -> Any:
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        breakable_cuda_graph as breakable,
    )

    return breakable.BreakableCUDAGraphCapture(breakable.BreakableCUDAGraph())


def group_capture() -> Any:
    from sglang.srt.distributed import parallel_state

    return parallel_state.graph_capture(stream=None)


def draft_graph_runner(runner: Any, captures: Callable[[], None]) -> Any:
    """A draft worker's graph runner with only the attributes that its `capture` reads."""
    from sglang.srt.speculative.eagle_draft_cuda_graph_runner import EAGLEDraftCudaGraphRunner

    draft: Any = object.__new__(EAGLEDraftCudaGraphRunner)
    draft.model_runner = runner
    draft.model_context = nullcontext
    draft._capture = captures
    return draft


def capture_beside_a_forward(draft_of: Any, forwards: Any) -> list[str]:
    """The order in which a draft's capture and a forward that began meanwhile end."""
    order: list[str] = []
    capturing, forwarded = threading.Event(), threading.Event()

    def captures() -> None:
        capturing.set()
        until(lambda: in_line("forward")() or forwarded.is_set())
        order.append("capture")

    def forward() -> None:
        assert capturing.wait(60)
        generate(forwards, activate=sglang_distguard.activate)
        order.append("forward")
        forwarded.set()

    run_in_threads(draft_graph_runner(draft_of, captures).capture, forward)
    return order


@pytest.fixture
def two(guard: None, model: Model) -> Iterator[list[Any]]:
    path = model("gpt2")
    built = [sglang_distguard.build_runner(server_args(path), name=name) for name in ("one", "two")]
    yield built
    for runner in built:
        sglang_distguard.close(runner)


def test_forwards_wait_for_the_graphs_that_a_draft_worker_captures_by_itself(
    two: list[Any], model: Model
) -> None:
    """0.5.23: the worker, not a ModelRunner, makes `EAGLEDraftCudaGraphRunner` and similar ones."""
    assert capture_beside_a_forward(*two) == ["capture", "forward"]
    expected = reference(model("gpt2")).logits
    for runner in two:
        assert bit_equal(generate(runner, activate=sglang_distguard.activate).logits, expected)
    assert inside() == []


def test_without_the_hooks_a_draft_workers_capture_overlaps_forwards(
    sglang: None, model: Model, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    left = [it for it in generation_0_5_21.changes() if it not in graph_captures.CHANGES]
    monkeypatch.setattr(versions, "GENERATIONS", {"without captures": lambda: left})
    two = request.getfixturevalue("two")
    assert capture_beside_a_forward(*two) == ["forward", "capture"]


def test_a_draft_workers_capture_is_in_its_runners_scope(two: list[Any]) -> None:
    seen: list[Any] = []
    draft_graph_runner(two[0], lambda: seen.append((_core.current_scope(), inside()))).capture()
    assert seen == [(handle_of(two[0]).scope, ["phase:capture"])]


@pytest.mark.parametrize("graph", [cuda_graph, breakable_graph])
def test_a_capture_in_the_middle_of_a_forward_is_alone(
    guard: None, cuda: None, graph: Callable[[], Any]
) -> None:
    order: list[str] = []
    captures = threading.Event()

    def lazily() -> None:
        with in_phase("forward"):
            with graph():
                captures.set()
                until(in_line("forward"))
                with graph():  # a thread in the phase may enter it again
                    assert inside() == ["phase:forward", "phase:capture", "phase:capture"]
                order.append("capture")
            assert inside() == ["phase:forward"]

    def forward() -> None:
        assert captures.wait(60)
        with in_phase("forward"):
            order.append("forward")

    run_in_threads(lazily, forward)
    assert order == ["capture", "forward"]
    assert inside() == []


def test_two_forwards_that_capture_at_the_same_moment_do_not_hang(guard: None, cuda: None) -> None:
    both = threading.Barrier(2)
    outcomes: list[str] = []

    def lazily() -> None:
        try:
            with in_phase("forward"):
                both.wait()
                with cuda_graph():
                    outcomes.append("captured")
        except DeadlockError:
            outcomes.append("refused")

    run_in_threads(lazily, lazily)
    assert sorted(outcomes) == ["captured", "refused"]
    assert inside() == []


def test_a_capture_that_lets_other_threads_use_cuda_is_in_no_phase(guard: None, cuda: None) -> None:
    """0.5.23: `MetadataGlueGraph` captures while it serves; its error mode declares this."""
    with cuda_graph(capture_error_mode="thread_local"):
        assert inside() == []


def test_a_capture_that_fails_to_begin_or_to_end_leaves_the_phase(
    guard: None, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: Any, **_options: Any) -> None:
        assert inside() == ["phase:capture"]
        raise RuntimeError("on purpose")

    for step in ("capture_begin", "capture_end"):
        graph = cuda_graph()
        setattr(graph.cuda_graph, step, fails)
        with pytest.raises(RuntimeError, match="on purpose"), graph:
            pass
        assert inside() == []


def test_the_captures_of_communicators_are_in_the_phase(two: list[Any], cuda: None) -> None:
    from sglang.srt.distributed import parallel_state

    seen: list[Any] = []
    for group in ("tp", "pp"):
        getattr(parallel_state, f"get_{group}_group")().device_module = SimpleNamespace(
            Stream=lambda: "stream", stream=lambda _stream: nullcontext()
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "get_current_device_stream_fast", lambda: "stream")
        with group_capture() as context:
            seen.append((context.stream, inside()))
    assert seen == [("stream", ["phase:capture"])]
    assert inside() == []


def test_with_several_ranks_a_capture_in_no_turn_is_refused_while_others_live(
    two: list[Any], cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "ranks", object)
    with pytest.raises(NotSupported, match="outside of the steps that take turns"), cuda_graph():
        pass
    never = draft_graph_runner(two[0], lambda: pytest.fail("captured"))
    with pytest.raises(NotSupported, match="'one' captures graphs on one of several ranks"):
        never.capture()
    sglang_distguard.close(two[1])
    with sglang_distguard.activate(two[0]), cuda_graph():
        assert inside() == []  # no other runner lives


def test_every_text_of_sglang_that_captures_goes_through_what_is_hooked(sglang: None) -> None:
    """Fails when a release captures in a new way: then `hooks/graph_captures.py` must cover it."""
    from sglang.srt import runtime_context

    root = Path(runtime_context.__file__).parent
    texts = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in root.rglob("*.py")
    }
    executor = "model_executor/"

    def found(pattern: str) -> set[str]:
        return {name for name, text in texts.items() if re.search(pattern, text)}

    assert found(r"\.capture_begin\(|cudaStreamBeginCapture") == {
        f"{executor}runner_backend_utils/breakable_cuda_graph/breakable_cuda_graph.py"
    }
    overriding = {
        name
        for name, text in texts.items()
        if re.search(r"^class \w*GraphRunner\b.*?^    def capture\(", text, re.M | re.S)
    }
    assert overriding - {f"{executor}runner/base_cuda_graph_runner.py"} == {
        f"{executor}cpu_graph_runner.py",
        f"{executor}runner/decode_cuda_graph_runner.py",
        f"{executor}runner/prefill_cuda_graph_runner.py",
    }
    assert found(r'capture_error_mode="(thread_local|relaxed)"') == {
        f"{executor}runner/metadata_glue_graph.py",
        "speculative/dspark_components/dspark_sampling_accept_graph.py",
    }
