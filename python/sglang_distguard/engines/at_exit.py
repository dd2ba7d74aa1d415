"""Engines that are still open when the interpreter ends are closed, before it joins its threads.

An engine's threads are daemons, which the interpreter would stop wherever they are, and the files of
its sockets would stay. Nothing can be done after ``os._exit`` or a signal that ends the process.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from typing import Protocol


class _Engine(Protocol):
    name: str

    @property
    def pending(self) -> int: ...

    def close(self, drain: float) -> None: ...


_log = logging.getLogger("sglang_distguard")
#: Engines of this process; to close one again does nothing. Each act on it is one step for the GIL:
#: a forked child may be made at any moment, and a lock might be held then.
_open: set[weakref.ref[_Engine]] = set()
# A forked child has none of the threads of its parent's engines, and the files are the parent's.
os.register_at_fork(after_in_child=_open.clear)


def note(engine: _Engine) -> None:
    """Close ``engine`` when the interpreter ends, if it is still open then."""
    _watch()
    _open.add(weakref.ref(engine, _open.discard))


def is_any_answering() -> bool:
    """Whether any engine of this process has requests that are not answered."""
    return any(engine is not None and engine.pending for engine in [it() for it in _open.copy()])


@functools.cache
def _watch() -> None:
    # Such functions run in reverse order. `concurrent.futures` has registered its own at its
    # import; afterwards no executor takes work, which closing an engine may need (3.11).
    threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def _close_all() -> None:
    for engine in [ref() for ref in _open.copy()]:
        if engine is None:
            continue
        try:
            engine.close(0)
        except Exception as error:  # the other engines are closed, and the exit code stays
            _log.warning("engine %r was not closed at exit: %s", engine.name, error)
