"""Builds SGLang's TpModelWorker or Scheduler, and lets it serve, as one thread of SGLang does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

_Activate = Callable[[Any], Any]
_After = Callable[[str], None]
#: Steps of a Scheduler's loop; the prompts of ``steps.PROMPTS`` need fewer.
_STEPS = 24


class Worker:
    """A ``TpModelWorker``, which does one prefill."""

    settings: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self._workers: dict[int, Any] = {}
        self._drafts: dict[int, Any] = {}

    def _draft(self, server_args: Any, port: int, target: Any) -> Any:
        return None

    def drafts(self, runner: Any) -> list[Any]:
        """The draft runner that belongs to ``runner``, if there is one."""
        return [self._drafts[id(runner)].model_runner] if id(runner) in self._drafts else []

    def build(self, server_args: Any, after: _After) -> Any:
        """Build one; return its runner."""
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import bootstrap
        from sglang.srt.layers.moe import initialize_moe_config
        from sglang.srt.managers.tp_worker import TpModelWorker
        from sglang.srt.runtime_context import SpawnRanks, get_device, publish

        from sglang_distguard.testing import free_port

        port = free_port()
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        after("publish")
        initialize_moe_config()
        bootstrap.init_parallel_runtime(
            server_args=server_args, device=get_device().device, dist_port=port
        )
        bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(server_args))
        worker = TpModelWorker(server_args, 0, port)
        draft = self._draft(server_args, port, worker)
        after("load")
        worker.alloc_memory_pool()
        worker.init_attention_backends()
        if draft is not None:
            pool, allocator = worker.get_memory_pool()
            draft.alloc_memory_pool(worker.model_runner.memory_pool_config, pool, allocator)
            draft.draft_worker.init_attention_backends()
            draft.draft_worker.init_cuda_graphs()
            self._drafts[id(worker.model_runner)] = draft.draft_worker
        worker.init_cuda_graphs()
        after("graphs")
        self._workers[id(worker.model_runner)] = worker
        return worker.model_runner

    def serve(self, runner: Any, *, activate: _Activate, after: _After) -> None:
        """Let the worker of ``runner`` compute, and its draft worker."""
        import torch

        from sglang_distguard.testing import steps

        workers = [self._workers[id(runner)], self._drafts.get(id(runner))]
        with activate(runner), torch.no_grad():
            for worker in filter(None, workers):
                batch = steps._prefill_batch(steps.PROMPTS, worker.model_runner)
                worker.forward_batch_generation(batch)
        after("prefill")


class Drafting(Worker):
    """A ``TpModelWorker`` and a draft worker of SGLang's, each of which does one prefill.

    SGLang 0.5.23 has no draft decode and no verification for a CPU without AMX (docs/audit.md).
    """

    settings: Mapping[str, Any] = {
        "speculative_algorithm": "STANDALONE",
        "speculative_num_steps": 1,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 2,
    }

    def _draft(self, server_args: Any, port: int, target: Any) -> Any:
        from sglang.srt.speculative.standalone_worker_v2 import StandaloneDraftWorker

        return StandaloneDraftWorker(server_args, 0, port, target)


class Scheduler:
    """A ``Scheduler`` with a prefix cache and chunked prefills, which answers two requests."""

    settings: Mapping[str, Any] = {
        "disable_radix_cache": False,
        "chunked_prefill_size": 16,
        "enable_metrics": True,
    }

    def __init__(self) -> None:
        self._schedulers: dict[int, Any] = {}

    def drafts(self, _runner: Any) -> list[Any]:
        """No draft runners."""
        return []

    def build(self, server_args: Any, after: _After) -> Any:
        """Build one; return its runner."""
        from sglang.srt.managers import scheduler
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import PortArgs

        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        after("publish")
        made = scheduler.Scheduler(server_args, PortArgs.init_new(server_args))
        after("load")
        runner = made.tp_worker.model_runner
        self._schedulers[id(runner)] = made
        return runner

    def serve(self, runner: Any, *, activate: _Activate, after: _After) -> None:
        """Let the scheduler of ``runner`` answer, by the steps of its ``event_loop_normal``."""
        from sglang_distguard.testing import steps

        scheduler = self._schedulers[id(runner)]
        with activate(runner):
            for number, prompt in enumerate(steps.PROMPTS):
                request = steps.tokenized(f"{time.monotonic()}-{number}", prompt, 4)
                scheduler.handle_generate_request(request)
            for _ in range(_STEPS):
                plan = scheduler.get_next_batch_to_run(
                    running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
                )
                scheduler.running_batch = plan.running_batch
                batch = plan.batch_to_run
                if batch:
                    scheduler.process_batch_result(batch, scheduler.run_batch(batch))
                else:
                    scheduler.on_idle()
                scheduler.last_batch = batch
        if scheduler.running_batch.reqs or scheduler.waiting_queue:
            raise RuntimeError(f"the scheduler has not answered after {_STEPS} steps")
        after("decode")


#: Name -> class; ``settings`` are ``ServerArgs`` fields.
SERVERS: Mapping[str, Callable[[], Worker | Scheduler]] = {
    "worker": Worker,
    "drafting worker": Drafting,
    "scheduler": Scheduler,
}
