"""The scheduler and the detokenizer of an engine, each in a thread of its own.

They are SGLang's own classes, and run as in the processes that ``sgl.Engine`` starts (0.5.23:
`run_scheduler_process`, `run_detokenizer_process`).
"""

from __future__ import annotations

import contextvars
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Optional, Union

from sglang_distguard.api.closing import close
from sglang_distguard.config import settings
from sglang_distguard.errors import DistGuardError
from sglang_distguard.hooks import torch_profiler
from sglang_distguard.runner import weights
from sglang_distguard.runner.budget import release_memory
from sglang_distguard.runner.handle import clear_closed
from sglang_distguard.sync.pacing import Pace, starting

if TYPE_CHECKING:
    from sglang.srt.server_args import PortArgs, ServerArgs


#: How the name of an engine's scheduler ends; its runner has that name, too.
SCHEDULER = "-scheduler"


class Part:
    """One thread of an engine. It is starting until ``ready`` is done, and then runs or has ended.

    Attributes:
        name: of the thread.
        ports: of the engine.
        ready: done when it serves; its error is that of the start.
        error: what ended it; None while it runs, and after it was told to end.
        memory: what its runners may use, if that was chosen; see ``build_runner``.
        pace: of the engine's start.
        is_told: whether it was told to end.
        manager: SGLang's object; None before it is made, and after the thread has ended.
    """

    def __init__(
        self,
        name: str,
        ended: Callable[[Part], None],
        server_args: ServerArgs,
        ports: PortArgs,
    ) -> None:
        """Make the thread.

        Args:
            name: of the thread.
            ended: called in the thread, last, however it ends.
            server_args: settings of the engine, of which the part publishes a copy.
            ports: of the engine.
        """
        self.name = name
        self.ports = ports
        self.ready: Future[Any] = Future()
        self.error: Optional[BaseException] = None
        self.manager: Any = None
        self.memory: Union[int, float, None] = None
        self.pace: Optional[Pace] = None
        self._ended = ended
        self._args: Optional[ServerArgs] = own_copy(server_args)
        self.is_told = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, in a context without any scope."""
        contextvars.Context().run(self._thread.start)

    def end(self, timeout: float) -> bool:
        """Let the thread end; return whether it has.

        Args:
            timeout: seconds to wait. A thread that still starts ends when it has started.
        """
        self.is_told = True
        if self._thread.ident is None:
            return True
        until = time.monotonic() + timeout
        manager = self.manager
        if manager is not None:
            with suppress(DistGuardError):  # it is still inside a call: the thread has not ended
                close(manager, timeout=max(timeout, 0.001))
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        assert self._args is not None
        try:
            with settings.runner_scope(self.name, memory=self.memory), starting(self.pace):
                self._serve(self._args)
        except BaseException as error:
            if not self.is_told:
                self.error = error
        finally:
            manager, self.manager, self._args = self.manager, None, None
            try:
                if manager is not None:
                    close(manager)
                    forget(manager)
                    release_memory()
            except BaseException as error:  # callers wait for what follows
                self.error = self.error or error
            if not self.ready.done():
                told = RuntimeError(f"{self.name} was closed while it started")
                self.ready.set_exception(self.error or told)
            self._ended(self)

    def _serve(self, server_args: Any) -> None:
        raise NotImplementedError


class SchedulerPart(Part):
    """The thread of the Scheduler; ``ready`` has what SGLang's scheduler process reports.

    Attributes:
        shares: the runner with which its own one shares weights; None for none, and once it has
            been built.
    """

    shares: Any = None

    def _serve(self, server_args: Any) -> None:
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.runtime_context import SpawnRanks, publish

        ranks = SpawnRanks(world_rank=0, gpu_id=server_args.base_gpu_id)
        publish(server_args, role="scheduler", ranks=ranks)
        source, self.shares = self.shares, None
        with weights.sharing_with(source):
            self.manager = Scheduler(server_args, self.ports)
        del source
        if not self.is_told:
            self.ready.set_result(self.manager.get_init_info())
            try:
                self.manager.run_event_loop()
            finally:
                torch_profiler.stop_here()


class DetokenizerPart(Part):
    """The thread of the DetokenizerManager."""

    def _serve(self, server_args: Any) -> None:
        from sglang.srt.managers.detokenizer_manager import DetokenizerManager
        from sglang.srt.runtime_context import publish

        publish(server_args, role="detokenizer")
        self.manager = DetokenizerManager(server_args, self.ports)
        if not self.is_told:
            self.ready.set_result(None)
            self.manager.event_loop()


def forget(manager: Any) -> None:
    """Free what a closed manager of an engine has, its weights and caches, now.

    SGLang's objects refer to each other in circles (0.5.23: a Scheduler and its dispatchers, a
    ModelRunner and its configurators), which only a full collection of garbage would find.

    Args:
        manager: closed; no code but the engine's has it.
    """
    owners = [getattr(manager, "tree_cache", None)]
    for name in ("tp_worker", "draft_worker"):
        worker = getattr(manager, name, None)
        for it in (worker, getattr(worker, "draft_worker", None)):
            runners = [getattr(it, name, None) for name in ("_model_runner", "draft_runner")]
            for runner in runners:
                model: Any = getattr(runner, "model", None)
                # Modules without weights, such as activations, may be those of other models, too.
                for module in model.modules() if hasattr(model, "modules") else ():
                    module._parameters.clear()
                    module._buffers.clear()
            owners += [it, *runners]
    for owner in owners:
        getattr(owner, "__dict__", {}).clear()
    clear_closed(manager)


def own_copy(server_args: ServerArgs) -> ServerArgs:
    """As the process of a part would have it: each part publishes its own object."""
    copied: ServerArgs = pickle.loads(pickle.dumps(server_args))
    return copied
