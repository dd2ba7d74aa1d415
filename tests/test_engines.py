"""``Engine``: right for any number of threads and loops; it fails, ends and is closed alone."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_calls import write_tokenizer
from references import reference
from sglang_distguard import Engine, EngineClosed, EngineFailed, NotSupported, _core
from sglang_distguard.engines import launch, parts
from sglang_distguard.testing import server_args
from sglang_distguard.testing.steps import PROMPTS

Model = Callable[..., Path]
KINDS = (("llama", "float32"), ("qwen3_moe", "bfloat16"))
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
#: Many tokens, so that a request is still running when something else happens.
LONG = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
MANY = 300.0  # seconds; nothing here takes more than a fraction of it


def opened(model: Model, architecture: str, dtype: str = "float32", **settings: Any) -> Engine:
    args = server_args(model(architecture), dtype=dtype, sleep_on_idle=True, **settings)
    return Engine(server_args=args, name=architecture, start_timeout=MANY)


def asked(engine: Any) -> list[list[int]]:
    answers = engine.generate(input_ids=[list(it) for it in PROMPTS], sampling_params=GREEDY)
    return [answer["output_ids"] for answer in answers]


def scheduler_of(engine: Engine) -> Any:
    (part,) = [it for it in engine._begun if it.name.endswith(parts.SCHEDULER)]
    return part.manager


@contextmanager
def while_closing(engine: Engine) -> Iterator[None]:
    """Run the with block while another thread closes the engine, which waits for its requests."""
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(engine.close, drain=MANY)
        while not engine._is_closing and not closed.done():
            pass
        yield
        closed.result(MANY)


@pytest.fixture
def engine(guard: None, model: Model) -> Iterator[Engine]:
    made = opened(model, "llama")
    yield made
    made.close(drain=0)


@pytest.fixture
def alone(model: Model) -> Callable[[str, str], list[list[int]]]:
    def tokens(architecture: str, dtype: str) -> list[list[int]]:
        return reference(model(architecture), dtype).tokens

    return tokens


def test_engines_opened_at_once_answer_at_once_as_their_models_alone(
    guard: None, model: Model, alone: Any
) -> None:
    expected = [alone(*kind) for kind in KINDS]
    with ThreadPoolExecutor() as pool:
        engines = list(pool.map(lambda kind: opened(model, *kind), KINDS))
        try:
            for _ in range(3):
                futures = [pool.submit(asked, engine) for engine in engines for _ in range(2)]
                found = [future.result() for future in futures]
                assert found == [expected[0], expected[0], expected[1], expected[1]]
        finally:
            for engine in engines:
                engine.close()


@pytest.fixture
def talking(model: Model, tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer: the word w7 is the token 7."""
    folder = Path(shutil.copytree(model("llama"), tmp_path / "talking"))
    write_tokenizer(folder)
    return folder


def speaking(folder: Path) -> Engine:
    args = server_args(folder, skip_tokenizer_init=False, sleep_on_idle=True)
    return Engine(server_args=args, name="speaking", start_timeout=MANY)


def test_text_is_answered_by_text(guard: None, talking: Path, alone: Any) -> None:
    def said(tokens: Iterable[int]) -> str:
        return " ".join(f"w{token}" for token in tokens)

    with speaking(talking) as engine:
        answers = engine.generate([said(prompt) for prompt in PROMPTS], GREEDY)
        assert [it["text"].strip() for it in answers] == [
            said(it) for it in alone("llama", "float32")
        ]
        *_, last = engine.generate(said(PROMPTS[0]), GREEDY, stream=True)
        assert last["text"] == answers[0]["text"]


def test_a_stream_ends_with_the_tokens_of_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate(input_ids=list(PROMPTS[0]), sampling_params=GREEDY)["output_ids"]
    given = engine.generate(input_ids=list(PROMPTS[0]), sampling_params=GREEDY, stream=True)
    chunks = [chunk["output_ids"] for chunk in given]
    assert len(chunks) >= 2
    assert chunks[-1] == whole


def test_any_asyncio_loop_may_ask(engine: Engine) -> None:
    expected = asked(engine)

    async def ask() -> tuple[list[list[int]], list[int]]:
        both = await asyncio.gather(
            *(engine.async_generate(input_ids=list(it), sampling_params=GREEDY) for it in PROMPTS)
        )
        last: list[int] = []
        stream = await engine.async_generate(
            input_ids=list(PROMPTS[0]), sampling_params=GREEDY, stream=True
        )
        async for chunk in stream:
            last = chunk["output_ids"]
        return [it["output_ids"] for it in both], last

    for _ in range(2):  # two loops
        both, last = asyncio.run(ask())
        assert both == expected
        assert last == expected[0]


def test_a_request_whose_caller_is_cancelled_is_aborted(engine: Engine) -> None:
    async def cancel() -> None:
        stream = await engine.async_generate(
            input_ids=list(PROMPTS[0]), sampling_params=LONG, stream=True
        )
        async for _ in stream:
            break
        await stream.aclose()
        task = asyncio.create_task(
            engine.async_generate(input_ids=list(PROMPTS[0]), sampling_params=LONG)
        )
        while len(engine.tokenizer_manager.rid_to_state) == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    manager = engine.tokenizer_manager
    asked(engine)  # later than the aborts
    assert manager.rid_to_state == {}


def test_a_request_is_aborted_by_its_id(engine: Engine) -> None:
    stream = engine.generate(
        input_ids=list(PROMPTS[0]), sampling_params=LONG, rid="long", stream=True
    )
    next(stream)
    engine.abort("long")
    *_, last = stream
    assert last["meta_info"]["finish_reason"]["type"] == "abort"


def test_other_methods_are_those_of_sgl_engine(engine: Engine) -> None:
    assert engine.get_model_info()["model_path"] == engine.get_server_info()["model_path"]
    assert engine.flush_cache().success
    with pytest.raises(NotSupported, match="freeze_gc is not supported: it would keep"):
        engine.freeze_gc()
    with pytest.raises(AttributeError, match="no attribute 'does_not_exist'"):
        _ = engine.does_not_exist


def test_new_weights_are_those_of_the_next_answer(engine: Engine, model: Model) -> None:
    other = model("llama", seed=1)
    before = engine.get_weights_by_name("lm_head.weight", truncate_size=2)
    assert engine.update_weights_from_disk(str(other))[0]
    assert engine.get_weights_by_name("lm_head.weight", truncate_size=2) != before
    assert asked(engine) == reference(other).tokens


def test_settings_that_need_further_processes_are_refused_by_name(
    guard: None, model: Model
) -> None:
    for field in launch._ONE:
        settings: dict[str, Any] = {field: 2}
        args = server_args(model("llama"), **settings)
        with pytest.raises(NotSupported, match=f"asks for {field}=2, which needs 2 processes"):
            Engine(server_args=args)


def test_an_engine_that_fails_fails_its_own_callers_with_the_cause_and_nothing_else(
    guard: None, model: Model, alone: Any
) -> None:
    healthy, failing = opened(model, "qwen3_moe", "bfloat16"), opened(model, "llama")
    try:
        asked(failing)

        def breaks(*_args: Any) -> None:
            raise ValueError("planted")

        failing._begun[0].manager.run_batch = breaks
        for _ in range(2):  # a request that is pending, and a later one
            with pytest.raises(
                EngineFailed, match="'llama' has failed: ValueError: planted"
            ) as told:
                asked(failing)
            assert isinstance(told.value.__cause__, ValueError)
        assert asked(healthy) == alone("qwen3_moe", "bfloat16")
        failing.close()
        with opened(model, "llama") as another:
            assert asked(another) == alone("llama", "float32")
    finally:
        healthy.close()
        failing.close()


def test_callers_are_told_also_when_what_a_failed_engine_had_cannot_be_freed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that has failed leaves no GPU to give memory back to."""

    def breaks(*_: Any) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(parts, "release_memory", breaks)
    engine._begun[0].manager.run_batch = breaks
    with pytest.raises(EngineFailed, match="'llama' has failed: ValueError: planted"):
        asked(engine)


def test_a_forked_child_is_refused_and_does_not_close_its_parents_engine(engine: Engine) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine.close()
            engine.generate(input_ids=[1], sampling_params=GREEDY)
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as told:
        assert "ForkedError: engine 'llama' was opened in process" in told.read()
    assert len(asked(engine)) == len(PROMPTS)


def test_an_engine_that_does_not_start_leaves_nothing(
    guard: None, tmp_path: Path, own_folder: None
) -> None:
    def start() -> None:
        with pytest.raises(Exception, match="config"):
            Engine(model_path=str(tmp_path), device="cpu", start_timeout=MANY)

    start()  # imports, of which one makes a descriptor that stays
    before = left()
    start()
    assert left() == before


def test_closing_waits_for_requests_and_refuses_later_ones(engine: Engine) -> None:
    begun = threading.Event()
    answers: list[Any] = []

    def ask() -> None:
        for chunk in engine.generate(input_ids=list(PROMPTS[0]), sampling_params=LONG, stream=True):
            begun.set()
            answers.append(chunk)

    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(MANY)
    engine.close(drain=MANY)
    asking.join(MANY)
    with pytest.raises(EngineClosed, match="'llama' is closed; open another one"):
        asked(engine)
    engine.close()


def test_what_is_pending_when_draining_ends_gets_a_typed_error(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(engine.generate, input_ids=list(PROMPTS[0]), sampling_params=LONG)
        while len(engine.tokenizer_manager.rid_to_state) == 0 and not pending.done():
            pass
        engine.close(drain=0)
        with pytest.raises(EngineClosed, match="closed before this request was answered"):
            pending.result(MANY)


def test_a_request_that_close_waits_for_can_be_aborted_and_one_that_is_over_is_left_alone(
    engine: Engine,
) -> None:
    stream = engine.generate(
        input_ids=list(PROMPTS[0]), sampling_params=LONG, rid="long", stream=True
    )
    next(stream)
    scheduler = scheduler_of(engine)
    is_aborted, step = threading.Event(), scheduler.get_next_batch_to_run

    def after_the_abort(*args: Any, **kwargs: Any) -> Any:
        assert is_aborted.wait(MANY)
        return step(*args, **kwargs)

    scheduler.get_next_batch_to_run = after_the_abort
    with while_closing(engine):
        try:
            engine.abort("long")
        finally:
            is_aborted.set()
        *_, last = stream
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    engine.abort("long")
    engine.abort(all=True)


def test_an_engine_that_fails_while_close_waits_for_its_requests_fails_them_with_the_cause(
    engine: Engine,
) -> None:
    stream = engine.generate(input_ids=list(PROMPTS[0]), sampling_params=LONG, stream=True)
    next(stream)
    is_closing = threading.Event()

    def fail(*_args: Any, **_kwargs: Any) -> None:
        assert is_closing.wait(MANY)
        raise ValueError("planted")

    scheduler_of(engine).process_batch_result = fail
    with while_closing(engine):
        is_closing.set()
        with pytest.raises(EngineFailed, match="planted"):
            for _ in stream:
                pass


def test_an_engine_whose_frontend_ends_by_itself_has_failed_and_is_closed_whole(
    engine: Engine,
) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    stream = engine.generate(input_ids=list(PROMPTS[0]), sampling_params=LONG, stream=True)
    next(stream)
    engine._loop.submit(leave())
    with pytest.raises(EngineFailed, match="SystemExit: 3"):
        for _ in stream:
            pass
    with pytest.raises(EngineFailed, match="SystemExit: 3"):
        asked(engine)
    engine.abort("long")
    parts = engine._begun
    engine.close(drain=MANY)
    assert not any(it._thread.is_alive() for it in parts)


def test_no_part_starts_once_a_start_has_timed_out(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt import plugins

    may_go, started = threading.Event(), []
    load, start = plugins.load_plugins, parts.Part.start

    def wait_and_load() -> None:
        assert may_go.wait(MANY)
        load()

    def note_and_start(part: parts.Part) -> None:
        started.append(part.name)
        start(part)

    monkeypatch.setattr(plugins, "load_plugins", wait_and_load)
    monkeypatch.setattr(parts.Part, "start", note_and_start)
    with pytest.raises(TimeoutError, match="did not serve within"):
        Engine(server_args=server_args(model("llama")), name="late", start_timeout=0.05)
    frontends = [it for it in threading.enumerate() if it.name == "late-frontend"]
    may_go.set()
    for thread in frontends:
        thread.join(MANY)
    assert len(frontends) == 1
    assert started == []


def test_closing_an_engine_wakes_its_idle_scheduler(engine: Engine) -> None:
    sleeper = scheduler_of(engine).idle_sleeper
    sleeper.maybe_sleep = sleeper.poller.poll  # without SGLang's limit of a second
    asked(engine)  # it sleeps so afterwards
    engine.close(drain=0)


def test_a_stream_that_is_dropped_while_its_engine_closes_reports_nothing(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its caller has cancelled it, so asyncio would report any other error as never retrieved."""
    stream = engine.generate(input_ids=list(PROMPTS[0]), sampling_params=LONG, stream=True)
    next(stream)
    with while_closing(engine):
        stream.close()
    gc.collect()
    assert [it.message for it in caplog.records if "never retrieved" in it.message] == []


#: Files in shared memory that this process has opened; other processes of the tests have theirs.
_opened: set[str] = set()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).startswith("/dev/shm/"):
        _opened.add(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for the sockets of this test's engines; a socket's path has at most 107 bytes."""
    import uvloop

    # A pipe for signals that libuv makes once per process (uvloop 0.22). SGLang sets uvloop's policy.
    uvloop.new_event_loop().close()
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def left() -> dict[str, Any]:
    """Threads, descriptors and files that engines of this process have made."""
    for thread in threading.enumerate():
        if "_watchdog_thread" in thread.name:  # told to end, and not waited for
            thread.join(MANY)
    return {
        "threads": sorted(it.name for it in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared memory": sorted(it for it in _opened if os.path.exists(it)),
        "sockets": sorted(it.name for it in Path(tempfile.gettempdir()).glob("tmp*")),
        "scopes": len(_core.live_scopes()),
    }


def test_a_closed_engine_has_freed_its_weights_and_caches_without_a_collection(
    guard: None, model: Model
) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.model_executor.model_runner import ModelRunner
    from torch.nn import Parameter

    def left() -> dict[str, int]:
        types = [type(it) for it in gc.get_objects()]
        return {it.__name__: types.count(it) for it in (Parameter, MHATokenToKVPool, ModelRunner)}

    gc.collect()
    gc.disable()
    try:
        before = left()
        with opened(model, "llama") as engine:
            asked(engine)
            assert left()["Parameter"] > before["Parameter"]
        assert left() == before
        assert not _core.live_scopes()
    finally:
        gc.enable()


def test_a_cycle_of_open_serve_and_close_leaves_nothing(
    guard: None, talking: Path, own_folder: None
) -> None:
    with speaking(talking) as first:  # imports and threads that stay
        first.generate("w5", GREEDY)
    before = left()
    with speaking(talking) as engine:
        engine.generate("w5", GREEDY)
    assert left() == before
