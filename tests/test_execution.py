"""The execution carries whose code is running: over tasks, threads, pools and given runners."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard as dg
from runner_calls import in_thread
from sglang_distguard import _core
from sglang_distguard.testing import bit_equal, fleet, free_port, server_args, steps
from sglang_distguard.testing.fleet import Member

Model = Callable[..., Path]
FLEET = [("llama", "float32"), ("qwen3_moe", "bfloat16"), ("gpt2", "float32")]


class Worker:
    """A worker of a serving framework: its stages are separate calls, from any thread or task."""

    STAGES = ("publish", "init", "load_model", "init_pools", "forward")

    def __init__(self, member: Member) -> None:
        self.args = server_args(member.model, dtype=member.dtype)
        self.port = free_port()
        self.runner: Any = None

    def publish(self) -> None:
        from sglang.srt.runtime_context import SpawnRanks, publish

        publish(self.args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))

    def init(self) -> None:
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import bootstrap

        bootstrap.init_parallel_runtime(server_args=self.args, device="cpu", dist_port=self.port)
        self.config = ModelConfig.from_server_args(self.args)
        bootstrap.init_layer_runtime(model_config=self.config)

    def load_model(self) -> None:
        from sglang.srt.model_executor.model_runner import ModelRunner

        self.runner = ModelRunner(
            model_config=self.config,
            mem_fraction_static=0.3,
            gpu_id=0,
            nccl_port=self.port,
            server_args=self.args,
        )

    def init_pools(self) -> None:
        self.runner.alloc_memory_pool()
        self.runner.init_attention_backends()
        self.runner.init_cuda_graphs()

    def forward(self) -> steps.Generation:
        # No activate: functions that are given a runner work for it.
        return steps.generate(self.runner)


def in_tasks(worker: Worker) -> Any:
    async def main() -> Any:
        out = None
        for stage in Worker.STAGES:

            async def one(stage: str = stage) -> Any:
                return getattr(worker, stage)()

            out = await asyncio.create_task(one())
        return out

    return asyncio.run(main())


def in_threads(worker: Worker) -> Any:
    return [in_thread(getattr(worker, stage)) for stage in Worker.STAGES][-1]


@contextlib.contextmanager
def driver(where: str) -> Iterator[Callable[[Worker], Any]]:
    if where in ("tasks", "threads"):
        yield in_tasks if where == "tasks" else in_threads
        return
    with ThreadPoolExecutor(1) as shared:

        def drive(worker: Worker) -> Any:
            return [shared.submit(getattr(worker, stage)).result() for stage in Worker.STAGES][-1]

        yield drive


@pytest.mark.parametrize("where", ["tasks", "threads", "shared executor"])
def test_a_staged_start_up_belongs_to_what_was_published(
    guard: None, cache: Path, where: str
) -> None:
    members = fleet.members(cache, FLEET)
    workers = [Worker(member) for member in members]
    made: list[Any] = [None] * len(members)
    start = threading.Barrier(len(members))
    with driver(where) as drive:

        def run(index: int) -> None:
            start.wait()
            try:
                made[index] = drive(workers[index])
            except BaseException as error:
                made[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(members))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for member, generation in zip(members, made, strict=True):
        assert isinstance(generation, steps.Generation), (member.name, generation)
        assert bit_equal(generation.logits, member.alone.logits), member.name
    for worker in workers:
        dg.close(worker.runner)
        worker.runner = None


def test_asyncio_tasks_that_publish_keep_their_own(guard: None, model: Model) -> None:
    from sglang.srt.runtime_context import SpawnRanks, get_model, publish

    async def one(name: str, published: asyncio.Event, other: asyncio.Event) -> tuple[str, str]:
        args = server_args(model(name))
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        first = Path(get_model().model_path).name
        published.set()
        await other.wait()
        return first, Path(get_model().model_path).name

    async def both() -> Any:
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(one("llama", a, b), one("gpt2", b, a))

    seen = asyncio.run(both())
    assert seen == [("llama-0", "llama-0"), ("gpt2-0", "gpt2-0")]


def published_model() -> str:
    from sglang.srt.runtime_context import get_model

    return Path(get_model().model_path).name


def publish_model(model: Model, name: str) -> None:
    from sglang.srt.runtime_context import SpawnRanks, publish

    ranks = SpawnRanks(world_rank=0, gpu_id=0)
    publish(server_args(model(name)), role="scheduler", ranks=ranks)


def test_the_last_publish_wins_for_all_threads_as_long_as_no_runner_lives(
    guard: None, model: Model
) -> None:
    with _core.run_as(None):
        in_thread(lambda: publish_model(model, "llama"))
        assert published_model() == "llama-0"
        in_thread(lambda: publish_model(model, "gpt2"))
        assert published_model() == "gpt2-0"
        publish_model(model, "opt")
        assert published_model() == "opt-0"
        in_thread(lambda: publish_model(model, "llama"))  # a thread that this one has started
        assert published_model() == "llama-0"


def test_code_that_published_sees_what_a_thread_of_it_publishes_and_builds(
    guard: None, model: Model
) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.distributed import parallel_state

    publish_model(model, "llama")
    runner = in_thread(lambda: steps.build(server_args(model("llama"))))
    try:
        assert parallel_state.model_parallel_is_initialized()
        assert parallel_state._TP is parallel_state.get_tp_group()
        publish_model(model, "gpt2")  # beside the living runner
        assert published_model() == in_thread(published_model) == "gpt2-0"
        assert runtime_context._CONTEXT is runtime_context.get_context()
    finally:
        dg.close(runner)


def test_a_publish_that_is_put_aside_is_built_later(guard: None, cache: Path) -> None:
    members = fleet.members(cache, FLEET[:2])
    first, second = (Worker(member) for member in members)
    in_thread(first.publish)
    in_thread(second.publish)
    assert in_thread(published_model) == members[1].model.name
    for worker, member in ((first, members[0]), (second, members[1])):
        for stage in Worker.STAGES[1:-1]:
            in_thread(getattr(worker, stage))
        assert bit_equal(in_thread(worker.forward).logits, member.alone.logits)
    for worker in (first, second):
        dg.close(worker.runner)
        worker.runner = None


def test_one_args_object_that_was_published_twice_is_refused_where_it_is_ambiguous(
    guard: None, model: Model
) -> None:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.runtime_context import SpawnRanks, publish

    args = server_args(model("llama"))
    ranks = SpawnRanks(world_rank=0, gpu_id=0)
    done = threading.Barrier(3)

    def hold() -> None:
        publish(args, role="scheduler", ranks=ranks)
        done.wait()
        done.wait()

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    done.wait()
    try:
        with pytest.raises(dg.AmbiguousBuild, match="published 2 times"):
            ModelConfig.from_server_args(args)
    finally:
        done.wait()
        for thread in threads:
            thread.join()


@pytest.fixture
def two(guard: None, cache: Path) -> Iterator[tuple[list[Any], list[Member]]]:
    members = fleet.members(cache, FLEET[:2])
    runners = [
        dg.build_runner(server_args(it.model, dtype=it.dtype), name=it.model.name) for it in members
    ]
    yield runners, members
    for runner in runners:
        dg.close(runner)
    del runners


def test_batches_made_without_activate_are_their_runners(two: Any) -> None:
    runners, members = two
    for _ in range(2):
        for runner, member in zip(runners, members, strict=True):
            for around in (contextlib.nullcontext(), *(dg.activate(it) for it in runners)):
                with around:
                    generation = steps.generate(runner)
                assert bit_equal(generation.logits, member.alone.logits), member.name


def test_a_batchs_configuration_is_of_the_runner_that_is_given(guard: None, model: Model) -> None:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

    modes = {}
    made = {}
    for name, hidden in (("with", True), ("without", False)):
        args = server_args(model("llama"), enable_return_hidden_states=hidden)
        made[name] = dg.build_runner(args, name=name)
    for name, runner in made.items():
        batch = steps._prefill_batch(steps.PROMPTS, runner)
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        modes[name] = forward_batch.capture_hidden_mode
    assert modes["with"] != CaptureHiddenMode.NULL
    assert modes["without"] == CaptureHiddenMode.NULL
    for runner in made.values():
        dg.close(runner)


def test_a_thread_that_serves_a_queue_makes_batches_of_the_runner_that_is_given(
    guard: None, model: Model
) -> None:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

    runners = [
        dg.build_runner(server_args(model("llama"), enable_return_hidden_states=returned))
        for returned in (True, False)
    ]
    given: queue.Queue[Any] = queue.Queue()
    hidden: list[bool] = []

    def serve() -> None:
        while (runner := given.get()) is not None:
            batch = steps._prefill_batch(steps.PROMPTS, runner)
            made = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
            hidden.append(made.capture_hidden_mode != CaptureHiddenMode.NULL)

    for starter in runners:
        with dg.activate(starter):  # the thread keeps its scope, whoever gives it work
            thread = threading.Thread(target=serve)
            thread.start()
        for runner in (*runners, None):
            given.put(runner)
        thread.join()
    for runner in runners:
        dg.close(runner)
    assert hidden == [True, False] * 2


def seen_model() -> str:
    execution = _core.current_execution()
    return "no runner" if execution is None or execution.runner is None else execution.runner.name


def by_thread_pool(pool: Any) -> str:
    return str(pool.apply(seen_model))


def by_map(pool: Any) -> str:
    return str(pool.map(lambda _: seen_model(), [0])[0])


def by_imap(pool: Any) -> str:
    return str(next(pool.imap(lambda _: seen_model(), [0])))


def by_keyword(pool: Any) -> str:
    return str(pool.apply_async(func=seen_model).get())


def by_imap_with_keywords(pool: Any) -> str:
    return str(next(pool.imap_unordered(iterable=[0], func=lambda _: seen_model())))


def by_executor(pool: Any) -> str:
    return str(pool.submit(seen_model).result())


@pytest.mark.parametrize(
    ("make", "ask"),
    [
        (lambda: ThreadPool(1), by_thread_pool),
        (lambda: ThreadPool(1), by_map),
        (lambda: ThreadPool(1), by_imap),
        (lambda: ThreadPool(1), by_keyword),
        (lambda: ThreadPool(1), by_imap_with_keywords),
        (lambda: ThreadPoolExecutor(1), by_executor),
    ],
)
def test_work_in_a_pool_belongs_to_the_code_that_submitted_it(
    two: Any, make: Callable[[], Any], ask: Callable[[Any], str]
) -> None:
    (first, second), _ = two
    with dg.activate(first):
        pool = make()
        names = [ask(pool)]
    with dg.activate(second):
        names.append(ask(pool))
    names.append(ask(pool))
    assert names == ["llama-0", "qwen3_moe-0", "no runner"]
    (pool.terminate if isinstance(pool, ThreadPool) else pool.shutdown)()


def test_a_coroutine_given_to_a_loop_of_another_thread_belongs_to_the_code_that_gave_it(
    two: Any,
) -> None:
    (first, second), _ = two
    loop = asyncio.new_event_loop()
    with dg.activate(first):
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

    async def ask() -> str:
        return seen_model()

    with dg.activate(second):
        assert asyncio.run_coroutine_threadsafe(ask(), loop).result() == "qwen3_moe-0"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_torchs_data_loading_threads_belong_to_the_code_that_started_them(two: Any) -> None:
    from torch.utils.data import DataLoader

    (first, second), _ = two
    with dg.activate(second):
        data: Any = list(range(4))
        loader = DataLoader(data, batch_size=2, collate_fn=lambda _: seen_model())
        assert list(loader) == ["qwen3_moe-0"] * 2
    assert list(loader) == ["no runner"] * 2
    assert first is not second


def test_the_processs_thread_of_shared_memory_is_of_no_runner(two: Any) -> None:
    from multiprocessing import resource_sharer

    (first, _), _ = two
    seen: queue.Queue[str] = queue.Queue()
    shared: Any = resource_sharer.__dict__["_resource_sharer"]
    shared.stop()  # so that the next to share starts the thread
    with dg.activate(first):
        ident = shared.register(lambda *_: seen.put(seen_model()), lambda: None)
        shared.get_connection(ident).close()
    assert seen.get(timeout=60) == "no runner"
    shared.stop()


def test_a_thread_started_in_a_step_is_of_its_runner_and_outlives_the_step(two: Any) -> None:
    runners, _ = two
    seen: queue.Queue[Any] = queue.Queue()
    go_on = threading.Event()

    def work() -> None:
        execution = _core.current_execution()
        assert execution is not None
        seen.put((seen_model(), execution.step))
        go_on.wait()
        seen.put((seen_model(), execution.step))

    original = runners[1].model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if seen.empty() and not started:
            started.append(threading.Thread(target=work))
            started[0].start()
        return original(*args, **kwargs)

    started: list[threading.Thread] = []
    runners[1].model.forward = forward
    steps.generate(runners[1], steps=0)
    assert seen.get() == ("qwen3_moe-0", "forward")
    go_on.set()
    assert seen.get() == ("qwen3_moe-0", None)
    started[0].join()
    del runners[1].model.forward


def test_a_default_dtype_set_in_a_task_is_seen_by_no_other_task(two: Any) -> None:
    import torch

    (_, second), _ = two

    async def holder(is_set: asyncio.Event, go_on: asyncio.Event) -> Any:
        with dg.activate(second):
            torch.set_default_dtype(torch.float64)
            is_set.set()
            await go_on.wait()
            return torch.get_default_dtype(), torch.empty(1).dtype

    async def other(is_set: asyncio.Event, go_on: asyncio.Event) -> Any:
        await is_set.wait()
        seen = torch.get_default_dtype(), torch.empty(1).dtype
        steps.generate(second, steps=0)  # a step that ends on this thread
        torch.set_default_dtype(torch.float16)  # of no runner: the process's
        go_on.set()
        return seen

    async def main() -> Any:
        is_set, go_on = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(holder(is_set, go_on), other(is_set, go_on))

    try:
        held, seen = asyncio.run(main())
        assert held == (torch.float64, torch.float64)
        assert seen == (torch.float32, torch.float32)
        assert torch.empty(1).dtype is torch._C.get_default_dtype() is torch.float16
    finally:
        torch._C._set_default_dtype(torch.float32)


def test_a_default_dtype_holds_in_threads_and_whatever_the_processs_default_is(guard: None) -> None:
    import torch
    from sglang_distguard.context.default_dtype import holding

    def made() -> torch.dtype:
        return torch.empty(1).dtype

    with holding(torch.bfloat16), ThreadPoolExecutor(1) as pool:
        assert in_thread(made) is torch.bfloat16
        assert pool.submit(made).result() is torch.bfloat16
    with _core.run_as(None):
        torch.set_default_dtype(torch.bfloat16)
        with holding(torch.bfloat16):
            # A trainer resets the process's default in the middle of the load.
            thread = threading.Thread(target=torch._C._set_default_dtype, args=(torch.float32,))
            thread.start()
            thread.join()
            assert made() is torch.bfloat16
        assert made() is torch.float32
