"""Builds SGLang's TpModelWorker or Scheduler, and lets it serve, as one thread of SGLang does."""

from __future__ import annotations

import time
from array import array
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
        after("load")
        worker.alloc_memory_pool()
        worker.init_attention_backends()
        worker.init_cuda_graphs()
        after("graphs")
        self._workers[id(worker.model_runner)] = worker
        return worker.model_runner

    def serve(self, runner: Any, *, activate: _Activate, after: _After) -> None:
        """Let the worker of ``runner`` compute."""
        import torch

        from sglang_distguard.testing import steps

        worker = self._workers[id(runner)]
        with activate(runner), torch.no_grad():
            worker.forward_batch_generation(steps._prefill_batch(steps.PROMPTS, runner))
        after("prefill")


class Scheduler:
    """A ``Scheduler`` with a prefix cache and chunked prefills, which answers two requests."""

    settings: Mapping[str, Any] = {"disable_radix_cache": False, "chunked_prefill_size": 16}

    def __init__(self) -> None:
        self._schedulers: dict[int, Any] = {}

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
                scheduler.handle_generate_request(_request(f"{time.monotonic()}-{number}", prompt))
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


def _request(name: str, prompt: tuple[int, ...]) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    wishes = SamplingParams(max_new_tokens=4, temperature=0)
    wishes.normalize(None)
    return TokenizedGenerateReqInput(
        rid=name,
        input_text="",
        input_ids=array("q", prompt),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=wishes,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )


#: Name -> class; ``settings`` are ``ServerArgs`` fields.
SERVERS: Mapping[str, Callable[[], Worker | Scheduler]] = {
    "worker": Worker,
    "scheduler": Scheduler,
}
