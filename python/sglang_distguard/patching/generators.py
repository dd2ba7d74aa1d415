"""Make each item of an asynchronous generator in a with block of its own.

One block around the whole body would stay entered while the consumer runs: its next code would
belong to the generator's runner, also in another task.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sglang_distguard.patching.applied import MakeHook


class _Manager(Protocol):
    """A manager of ``WithinMethods`` that serves asynchronous generators, too."""

    def __call__(self, owner: Any, /) -> AbstractContextManager[Any]: ...

    def holding(self, owner: Any, /) -> AbstractContextManager[Any]:
        """Return a with block that the generator is in from its first item to its last.

        It must not depend on the context, which differs from item to item.
        """
        ...


def each_item_within(manager: Callable[[Any], Any]) -> MakeHook:
    """Return what makes the hook of an asynchronous generator method with this ``_Manager``."""
    enter: _Manager = manager  # type: ignore[assignment]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def items(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            owner = args[0]
            made = original(*args, **kwargs)
            with enter.holding(owner):
                step: Callable[[], Any] = lambda: made.asend(None)  # noqa: E731
                while True:
                    try:
                        with enter(owner):
                            item = await step()
                    except StopAsyncIteration:
                        return
                    try:
                        sent = yield item
                    except GeneratorExit:
                        with enter(owner):
                            await made.aclose()
                        raise
                    except BaseException as error:
                        step = functools.partial(made.athrow, error)
                    else:
                        step = functools.partial(made.asend, sent)

        return items

    return make
