"""An engine's start pauses while other engines answer, and only then."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_distguard import Engine
from sglang_distguard.sync import pacing
from sglang_distguard.sync.pacing import Pace, pause, starting
from sglang_distguard.testing import server_args
from sglang_distguard.testing.steps import PROMPTS

Model = Callable[..., Path]
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def compute() -> None:
    """Use the processor for long enough that a pause is worth it."""
    until = time.thread_time() + 2 * pacing._WORTH
    while time.thread_time() < until:
        pass


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each pause was to be; none takes any time."""
    found: list[float] = []
    times = SimpleNamespace(thread_time=time.thread_time, sleep=found.append)
    monkeypatch.setattr(pacing, "time", times)
    return found


def test_a_start_pauses_in_proportion_to_what_it_has_computed(slept: list[float]) -> None:
    with starting(Pace(lambda: True)):
        pause()  # begins to count
        assert not slept
        compute()
        pause()
        pause()  # has computed nothing since
        compute()
        pause(0.001)
    assert len(slept) == 2
    assert pacing._TIMES * 2 * pacing._WORTH <= slept[0] <= pacing._LONGEST
    assert slept[1] == 0.001


def test_a_start_that_disturbs_nothing_does_not_pause(slept: list[float]) -> None:
    disturbs = False
    with starting(Pace(lambda: disturbs)):
        pause()
        compute()
        pause()
        disturbs = True
        pause()  # what was computed before disturbed nothing
    assert not slept


def test_code_outside_of_a_start_does_not_pause(slept: list[float]) -> None:
    with starting(Pace(lambda: True)):
        pause()
    compute()
    pause()
    assert not slept


def test_a_task_that_a_start_has_made_does_not_pause_once_that_is_over(slept: list[float]) -> None:
    pace = Pace(lambda: True)
    with starting(pace):
        task = contextvars.copy_context()

    def work() -> int:
        pause()
        compute()
        pause()
        return len(slept)

    assert task.run(work) == 1
    pace.end()
    assert task.run(work) == 1


@contextmanager
def opened(folder: Path, name: str, **how: Any) -> Iterator[Engine]:
    args = server_args(folder, sleep_on_idle=True)
    with Engine(server_args=args, name=name, start_timeout=300, **how) as engine:
        yield engine


def asked(engine: Engine) -> Any:
    answers = engine.generate(input_ids=[list(it) for it in PROMPTS], sampling_params=GREEDY)
    return [answer["output_ids"] for answer in answers]


def test_an_engine_that_starts_pauses_while_another_answers(guard: None, model: Model) -> None:
    folder = model("llama")
    with opened(folder, "first") as first:
        alone = asked(first)
        with opened(folder, "beside nothing") as second:
            assert second._pace is not None
            assert second._pace.pauses == 0
        answers = []
        with answering(first, answers), opened(folder, "beside") as second:
            assert second._pace is not None
            assert second._pace.pauses > 0
            assert asked(second) == alone
        with answering(first, answers), opened(folder, "as fast as it can", paced=False) as second:
            assert second._pace is None
            assert asked(second) == alone
        assert answers
        assert all(answer == alone for answer in answers)


@contextmanager
def answering(engine: Engine, answers: list[Any]) -> Iterator[None]:
    """Let the engine answer without a break in a with block, which begins with its first answer."""
    begun, is_over = threading.Event(), threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            answers.append(asked(engine))
            begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait(300)
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_paced_must_be_a_flag(guard: None, model: Model) -> None:
    with pytest.raises(TypeError, match="paced"):
        Engine(server_args=server_args(model("llama")), paced=1)  # type: ignore[arg-type]
