"""The class of SGLang's NGRAM speculation is registered once, however many engines come at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sglang_distguard
from sglang_distguard.errors import AcquireTimeout
from sglang_distguard.hooks.ngram_corpus import made_once

COUNT = 4


def as_sglang(register: object) -> object:
    """SGLang's `cache_once` (0.5.23) for a function without arguments."""
    results: dict[tuple[()], object] = {}

    def wrapper() -> object:
        if () not in results:
            results[()] = register()  # type: ignore[operator]
        return results[()]

    return wrapper


class Registry:
    """Refuses a second registration, as tvm_ffi does."""

    def __init__(self, parties: int) -> None:
        #: Where nothing orders the threads, all are in ``register`` at once.
        self.meet = threading.Barrier(parties)
        self.registered: list[type] = []

    def register(self) -> type:
        self.meet.wait(60)
        made = type("Registered", (), {})
        self.registered.append(made)
        if len(self.registered) > 1:
            raise RuntimeError("Overriding sgl.NgramCorpus")
        return made


def test_without_the_treatment_threads_that_come_at_once_register_it_twice() -> None:
    registry = Registry(COUNT)
    make = as_sglang(registry.register)
    with ThreadPoolExecutor(COUNT) as pool:
        ended = [pool.submit(make) for _ in range(COUNT)]  # type: ignore[arg-type]
    assert sum(it.exception() is not None for it in ended) == COUNT - 1


def test_of_threads_that_come_at_once_one_registers_and_all_get_its_class() -> None:
    registry = Registry(1)

    def register() -> type:
        return registry.register()

    make = as_sglang(made_once(register))
    meet = threading.Barrier(COUNT)

    def come() -> object:
        meet.wait(60)
        return make()  # type: ignore[operator]

    with ThreadPoolExecutor(COUNT) as pool:
        ended = [pool.submit(come) for _ in range(COUNT)]
    assert {it.result() for it in ended} == set(registry.registered)


def test_where_the_first_thread_fails_the_next_one_makes_it() -> None:
    inside, leave = threading.Event(), threading.Event()
    calls: list[str] = []

    def register() -> str:
        calls.append("called")
        if len(calls) == 1:
            inside.set()
            assert leave.wait(60)
            raise OSError("no compiler")
        return "made"

    make = made_once(register)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(make)
        assert inside.wait(60)
        second = pool.submit(make)
        leave.set()
        assert isinstance(first.exception(), OSError)
        assert second.result() == "made"
    assert make() == "made"
    assert len(calls) == 2


def test_a_thread_waits_for_another_ones_registration_until_its_deadline() -> None:
    inside, leave = threading.Event(), threading.Event()

    def register() -> str:
        inside.set()
        assert leave.wait(60)
        return "made"

    make = made_once(register)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(make)
        assert inside.wait(60)
        with (
            sglang_distguard.runner_scope(timeout=0.01),
            pytest.raises(AcquireTimeout, match="has not ended register within"),
        ):
            make()
        leave.set()
        assert first.result() == "made"
