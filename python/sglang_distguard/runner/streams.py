"""The CUDA stream of a runner: its kernels overlap those of other runners, and wait for no others.

torch gives each thread the same stream unless the thread chooses one (2.14), so that a read of one
runner's result waits for the kernels of all runners. A runner of ``build_runner`` may have a stream
of its own. What holds then:

- While such a runner is built, and in ``activate``, its stream is the thread's current one. All of
  its memory belongs to that stream, and so does what its code allocates there: the allocator gives
  it out again only to kernels that are launched on the same stream afterwards.
- At the beginning of such a with block the stream waits for the caller's, and at its end the
  caller's waits for the stream. So the block finds what was computed before it, and what is computed
  after it finds the block's results, on the card and without a wait of the host. A tensor of the
  caller must live until the block ends, as for any stream of torch.
- A step in a thread whose current stream is another one (code outside of ``activate``, or on a
  stream that it has chosen) stays there, and is ordered after all that was launched on the runner's
  stream and before all that will be: static buffers hold one batch.
- Nothing is switched in a thread that runs an asyncio loop, whose tasks share the current stream,
  nor where the current stream is not the default one: that code, such as SGLang's Scheduler with
  its own streams (0.5.23: `schedule_stream`, `forward_stream`), has chosen it.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from sglang_distguard.config import settings
from sglang_distguard.context import generation
from sglang_distguard.distributed import world
from sglang_distguard.runner.handle import find_handle

if TYPE_CHECKING:
    import torch

#: torch has a pool of 32 streams for each priority. SGLang's own, also those on which it captures,
#: are of priority 0 (0.5.23): none of them is ever a runner's.
_PRIORITY = -1
_lock = threading.Lock()


def start_afresh() -> None:
    """Renew the lock in a forked child: it may be held by a thread that does not exist there."""
    global _lock
    _lock = threading.Lock()


#: Device -> streams of closed runners. cuBLAS keeps a workspace for each stream that it has seen.
_free: dict[int, list[Any]] = {}


class _Taken(NamedTuple):
    """What is restored when a with block ends."""

    thread: int
    block: AbstractContextManager[object]
    caller: torch.cuda.Stream


class RunnerStream:
    """The stream of one runner and its drafts; native steps call ``begin`` and ``end``."""

    def __init__(self, device: int) -> None:
        """Take a stream that no living runner has, or make one.

        Args:
            device: index of the CUDA device.
        """
        import torch

        with _lock:
            free = _free.get(device)
            stream = free.pop() if free else None
        self.stream: Any = stream or torch.cuda.Stream(device, priority=_PRIORITY)
        self._device = device
        self._is_free = False

    def begin(self) -> Optional[Any]:
        """Order a step after the stream, if the thread is on another one; return that one."""
        import torch

        caller = torch.cuda.current_stream(self._device)
        # In a capture an event of another stream would draw that stream into the graph.
        if caller == self.stream or torch.cuda.is_current_stream_capturing():
            return None
        caller.wait_event(self.stream.record_event())
        return caller

    def end(self, caller: Optional[Any]) -> None:
        """Order the stream after a step; ``caller`` is what ``begin`` has returned."""
        if caller is not None:
            self.stream.wait_event(caller.record_event())

    def take(self, *, always: bool = False) -> Optional[_Taken]:
        """Make it the thread's current stream; None where it is not to be.

        Args:
            always: also where the thread has chosen a stream, or runs an asyncio loop.
        """
        import torch

        caller = torch.cuda.current_stream(self._device)
        chosen = caller != torch.cuda.default_stream(self._device)
        if not always and (chosen or asyncio._get_running_loop() is not None):
            return None
        self.stream.wait_event(caller.record_event())
        block = torch.cuda.stream(self.stream)
        block.__enter__()
        return _Taken(threading.get_ident(), block, caller)

    def release(self, taken: Optional[_Taken]) -> None:
        """Make the caller's stream current again; ``taken`` is what ``take`` has returned."""
        if taken is None:
            return
        try:
            taken.caller.wait_event(self.stream.record_event())
        finally:
            if taken.thread == threading.get_ident():  # a generator may end in another one
                taken.block.__exit__(None, None, None)

    def close(self) -> None:
        """Wait for what was launched on it, and leave it to a later runner."""
        try:
            self.stream.synchronize()
        except RuntimeError:  # a kernel has failed: the card is lost to this process
            return
        self.leave()

    def leave(self) -> None:
        """Leave the stream to a later runner, without a wait; once."""
        with _lock:
            if not self._is_free:
                self._is_free = True
                _free.setdefault(self._device, []).append(self.stream)


class OnItsStream:
    """An ``_core.Activation`` that also makes the runner's stream current."""

    def __init__(self, activation: AbstractContextManager[Any], stream: RunnerStream) -> None:
        self._activation = activation
        self._stream = stream
        self._taken: list[Optional[_Taken]] = []

    def __enter__(self) -> Any:
        runner = self._activation.__enter__()
        try:
            self._taken.append(self._stream.take())
        except BaseException:
            self._activation.__exit__(None, None, None)
            raise
        return runner

    def __exit__(self, *error: Any) -> None:
        try:
            # Left more often than entered: the activation says so.
            self._stream.release(self._taken.pop() if self._taken else None)
        finally:
            self._activation.__exit__(*error)


@contextmanager
def while_building(device: int) -> Iterator[Optional[RunnerStream]]:
    """Build a runner on a stream of its own, if the settings want that; yield the stream.

    Not with several ranks: communicators that wait for each other on several streams in different
    orders would wait forever (see ``collective_steps.may_overlap``).

    Args:
        device: index of the device, if it is a CUDA device.
    """
    wanted = settings.current().streams == "own" and generation.current().device() == "cuda"
    if not wanted or world.ranks() is not None:
        yield None
        return
    stream = RunnerStream(device)
    try:
        taken = stream.take(always=True)
        try:
            yield stream
        finally:
            stream.release(taken)
    except BaseException:
        stream.leave()
        raise


def give(runner: Any, stream: Optional[RunnerStream]) -> None:
    """Let ``runner``, which was built on ``stream``, have it until it is closed or collected."""
    handle = find_handle(runner)
    if stream is None or handle is None:
        return
    handle.stream = stream
    handle.keep_part(stream.close)
    weakref.finalize(handle, stream.leave).atexit = False


def share(draft: Any, target: Any) -> None:
    """Let a draft runner, which reads what its target computes, use the target's stream."""
    mine, other = find_handle(draft), find_handle(target)
    if mine is not None and other is not None:
        mine.stream = other.stream
