"""What can be closed is closed at the end of a with block, synchronous or not."""

from __future__ import annotations

from types import TracebackType
from typing import Optional, Self

from sglang_distguard.engines.loops import in_thread


class Closes:
    """A context manager whose end closes it."""

    def _close_at_end(self) -> None:
        """Close it, as the end of a with block does."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._close_at_end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        await in_thread(self._close_at_end)
