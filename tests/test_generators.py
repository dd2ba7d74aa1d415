"""Each item of an asynchronous generator is made in a with block; the consumer is in none."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from rewritten_modules import Load
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import Within, WithinMethods

SOURCE = """
    class Owner:
        def __init__(self):
            self.seen = []

        async def items(self, count):
            try:
                for number in range(count):
                    self.seen.append(here())
                    try:
                        sent = yield number
                    except KeyError as error:
                        sent = yield repr(error)
                    self.seen.append((sent, here()))
            finally:
                self.seen.append(("ended", here()))

        def plain(self):
            yield here()

        def documented(self):
            '''Does nothing.'''
"""
_here: ContextVar[str] = ContextVar("here", default="outside")


class Manager:
    """Notes in a context variable that its block is entered, and counts what is under way."""

    def __init__(self) -> None:
        self.under_way = 0

    @contextmanager
    def __call__(self, _owner: object) -> Iterator[None]:
        token = _here.set("inside")
        try:
            yield
        finally:
            _here.reset(token)

    @contextmanager
    def holding(self, _owner: object) -> Iterator[None]:
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1


def made(load: Load, manager: Manager) -> types.ModuleType:
    wanted = ("items", "documented")
    module, _ = load(
        SOURCE,
        lambda name: WithinMethods(name, "Owner", lambda it: manager if it in wanted else None),
    )
    setattr(module, "here", _here.get)
    return module


def test_items_are_made_inside_and_consumed_outside(load: Load) -> None:
    manager = Manager()
    owner = made(load, manager).Owner()

    async def consume() -> list[Any]:
        return [(item, _here.get(), manager.under_way) async for item in owner.items(2)]

    assert asyncio.run(consume()) == [(0, "outside", 1), (1, "outside", 1)]
    assert owner.seen == [
        "inside",
        (None, "inside"),
        "inside",
        (None, "inside"),
        ("ended", "inside"),
    ]
    assert manager.under_way == 0


def test_sent_values_and_thrown_errors_arrive_and_a_closed_generator_ends_inside(
    load: Load,
) -> None:
    manager = Manager()
    owner = made(load, manager).Owner()

    async def consume() -> list[Any]:
        stream = owner.items(5)
        got = [await stream.asend(None), await stream.asend("sent")]
        got.append(await stream.athrow(KeyError("thrown")))
        # Each item may be taken in another task.
        got.append(await asyncio.create_task(stream.__anext__()))
        await stream.aclose()
        return got

    assert asyncio.run(consume()) == [0, 1, "KeyError('thrown')", 2]
    assert owner.seen[1] == ("sent", "inside")
    assert owner.seen[-1] == ("ended", "inside")
    assert manager.under_way == 0


def test_an_error_of_the_generator_reaches_the_consumer(load: Load) -> None:
    manager = Manager()
    owner = made(load, manager).Owner()

    async def consume() -> None:
        stream = owner.items(2)
        await stream.asend(None)
        await stream.athrow(ValueError("unexpected"))

    with pytest.raises(ValueError, match="unexpected"):
        asyncio.run(consume())
    assert manager.under_way == 0


def test_a_generator_function_is_refused_before_anything_is_changed(load: Load) -> None:
    with pytest.raises(NotSupported, match=r"Owner\.plain is a generator function"):
        load(SOURCE, lambda name: Within(name, "Owner.plain", Manager()))


def test_a_method_that_only_has_a_docstring_is_enclosed(load: Load) -> None:
    assert made(load, Manager()).Owner().documented() is None
