"""SGLang's own steps, unchanged: build one runner; prefill and decode with one runner."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Optional, cast

from sglang_distguard.config.ports import free_port
from sglang_distguard.context import generation

if TYPE_CHECKING:
    import torch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

#: Token ids of two prompts of different length, within every test model's vocabulary.
PROMPTS: tuple[tuple[int, ...], ...] = (
    tuple((7 * i + 3) % 997 for i in range(20)),
    tuple((11 * i + 5) % 991 for i in range(33)),
)
#: Returns SGLang's ``MultimodalInputs`` of one prompt, new ones each time; None: text only.
Item = Optional[Callable[[], Any]]
#: Size of the cache of what a model's encoder makes of images and sounds.
_EMBEDDING_BYTES = 1 << 20
_NOTHING: Mapping[str, Any] = {}


def _ignore(step: str) -> None:
    pass


@dataclass(frozen=True)
class Generation:
    """What a runner generated.

    Attributes:
        tokens: per prompt the token ids that were sampled (greedily), one from the prefill and
            one per decode step.
        logits: of shape [steps + 1, prompts, vocabulary], in the runner's own dtype, on the CPU.
    """

    tokens: list[list[int]]
    logits: torch.Tensor


def build(
    server_args: ServerArgs,
    *,
    gpu_id: int = 0,
    is_draft_worker: bool = False,
    world_rank: int = 0,
    port: Optional[int] = None,
    after: Callable[[str], None] = _ignore,
) -> ModelRunner:
    """Build a runner exactly as SGLang's own code does, without any use of distguard.

    Args:
        server_args: a fresh object: SGLang resolves it in place.
        gpu_id: index of the CUDA device; 0 on CPU.
        is_draft_worker: whether to publish and initialise nothing, because the target, which was
            built before, has done so.
        world_rank: rank of this process, of ``tp_size`` times ``pp_size``.
        port: port where the ranks meet; default: a free one, for one rank.
        after: called with the name of each finished step: "publish", "init", "load",
            "pool", "backends", "graphs".
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.layers.quantization.unquant import initialize_bf16_gemm_config
    from sglang.srt.managers.mm_utils import init_mm_embedding_cache
    from sglang.srt.model_executor.model_runner import ModelRunner

    port = port or free_port()
    if not is_draft_worker:
        generation.current().publish(server_args, world_rank=world_rank, gpu_id=gpu_id)
        initialize_moe_config()
        initialize_fp8_gemm_config()
        initialize_bf16_gemm_config()
        initialize_fp4_gemm_config()
    after("publish")
    model_config = ModelConfig.from_server_args(server_args)
    if not is_draft_worker:
        bootstrap.init_parallel_runtime(
            server_args=server_args, device=generation.current().device(), dist_port=port
        )
        bootstrap.init_layer_runtime(model_config=model_config)
    after("init")
    runner = ModelRunner(
        model_config=model_config,
        mem_fraction_static=resolving_view(server_args).mem_fraction_static,
        gpu_id=gpu_id,
        nccl_port=port,
        server_args=server_args,
        is_draft_worker=is_draft_worker,
    )
    after("load")
    runner.alloc_memory_pool()
    if model_config.is_multimodal:
        init_mm_embedding_cache(_EMBEDDING_BYTES)  # as a Scheduler does with its pools (0.5.23)
    after("pool")
    runner.init_attention_backends()
    after("backends")
    runner.init_cuda_graphs()
    after("graphs")
    return runner


def generate(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    steps: int = 3,
    *,
    forced: Optional[Sequence[Sequence[int]]] = None,
    request: Optional[Mapping[str, Any]] = None,
    items: Sequence[Item] = (),
    activate: Callable[[ModelRunner], AbstractContextManager[Any]] = nullcontext,
    after: Callable[[str], None] = _ignore,
) -> Generation:
    """Prefill ``prompts`` as one batch, then decode.

    Args:
        runner: no other code may be generating with it, because its pools are cleared first.
        prompts: token ids.
        steps: decode steps after the prefill.
        forced: per prompt the token ids to continue with, at least ``steps`` of them, in place of
            the sampled ones (teacher forcing); ``Generation.tokens`` still has the sampled ones.
        request: arguments of SGLang's ``Req`` for every prompt that override those set here, such
            as ``sampling_params`` in the place of greedy ones.
        items: the image or sound of each prompt; default: all are text only. The runner's scope
            needs the cache that ``build`` makes (``mm_utils.init_mm_embedding_cache``).
        activate: entered around everything: SGLang's batch code reads its context outside the
            runner's methods (``sglang_distguard.activate``).
        after: called with "prefill" and "decode" when each is done.

    Raises:
        ValueError: there are too few forced tokens.
    """
    import torch

    if forced is not None and [len(f) >= steps for f in forced] != [True] * len(prompts):
        raise ValueError(f"forced needs {steps} tokens for each of {len(prompts)} prompts")
    with activate(runner), torch.no_grad():
        batch, token, logits = _extend(prompts, runner, request or {}, items)
        after("prefill")
        tokens, rows = [token], [logits]
        for step in range(steps):
            if forced is not None:
                token = torch.tensor([f[step] for f in forced], device=token.device)
            token, logits = _decode(token, batch, runner)
            tokens.append(token)
            rows.append(logits)
        after("decode")
        vocabulary = runner.model_config.vocab_size
        return Generation(
            tokens=torch.stack(tokens).T.tolist(),
            logits=torch.stack(rows)[..., :vocabulary].cpu(),
        )


def embed(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    activate: Callable[[ModelRunner], AbstractContextManager[Any]] = nullcontext,
    after: Callable[[str], None] = _ignore,
) -> torch.Tensor:
    """Prefill ``prompts`` as one batch of a model that does not generate.

    Args:
        runner: no other code may be computing with it, because its pools are cleared first.
        prompts: token ids.
        activate: as for ``generate``.
        after: called with "prefill" when that is done.

    Returns:
        The embedding or the scores of each prompt, shape [prompts, width], on the CPU.
    """
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    with activate(runner), torch.no_grad():
        # As `TpModelWorker.forward_batch_embedding` (0.5.23).
        forward_batch = ForwardBatch.init_new(
            _prefill_batch(prompts, runner), runner, return_hidden_states_before_norm=False
        )
        output = cast(Any, runner.forward(forward_batch).logits_output)
        after("prefill")
        return output.embeddings.reshape(len(prompts), -1).cpu()


def _extend(
    prompts: Sequence[Sequence[int]],
    runner: Any,
    request: Mapping[str, Any],
    items: Sequence[Item] = (),
) -> tuple[Any, Any, Any]:
    """As `sglang.benchmark.one_batch.extend` (0.5.23), returning the logits too."""
    batch = _prefill_batch(prompts, runner, request, items)
    token, logits = _forward(batch, runner)
    return batch, token, logits


def _prefill_batch(
    prompts: Sequence[Sequence[int]],
    runner: Any,
    request: Mapping[str, Any] = _NOTHING,
    items: Sequence[Item] = (),
) -> Any:
    """Put all prompts into one batch and allocate its memory."""
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    requests = []
    for index, (prompt, item) in enumerate(zip_longest(prompts, items)):
        made: Any = Req(
            rid=str(index),
            origin_input_text="",
            origin_input_ids=array("q", prompt),
            **{"sampling_params": SamplingParams(temperature=0, max_new_tokens=64), **request},
        )
        if item is not None:
            _give_item(made, item(), runner)
        made.full_untruncated_fill_ids = made.origin_input_ids
        made.logprob_start_len = -1
        if hasattr(made, "set_extend_range"):  # 0.5.21 and earlier
            made.set_extend_range(0, len(made.origin_input_ids))
        else:
            made.extend_end = len(made.origin_input_ids)
        requests.append(made)
    batch = ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=cast(Any, _NoCache(runner)),
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None and batch.prefill_input_ids_cpu is not None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    return batch


def tokenized(name: str, prompt: Sequence[int], steps: int, **sampling: Any) -> Any:
    """What a TokenizerManager of SGLang sends its Scheduler for one request (0.5.23).

    Args:
        name: the request's id.
        prompt: token ids.
        steps: how many tokens are generated, greedily.
        **sampling: further arguments of SGLang's ``SamplingParams``.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    wishes = SamplingParams(max_new_tokens=steps, temperature=0, **sampling)
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


def _give_item(request: Any, inputs: Any, runner: Any) -> None:
    """As `Scheduler.handle_generate_request` (0.5.23)."""
    request.origin_input_ids = runner.model.pad_input_ids(request.origin_input_ids, inputs)
    request.extend_image_inputs(inputs)


def _decode(token: Any, batch: Any, runner: Any) -> tuple[Any, Any]:
    import torch

    batch.input_ids = token.to(torch.int64)
    batch.prepare_for_decode()
    return _forward(batch, runner)


def _forward(batch: Any, runner: Any) -> tuple[Any, Any]:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    _prepare_data_parallel(batch, runner)
    forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
    contexts = generation.current()
    if contexts.widths(["pp_size"])["pp_size"] > 1:
        return _forward_stage(runner, forward_batch, contexts.stamped("pp_group"))
    output = runner.forward(forward_batch).logits_output
    token = runner.sample(output, forward_batch)
    return token, output.next_token_logits.clone()


def _prepare_data_parallel(batch: Any, runner: Any) -> None:
    """As `sglang.benchmark.one_batch._maybe_prepare_mlp_sync_batch` (0.5.23)."""
    from sglang.srt.managers.scheduler_components.dp_attn import prepare_mlp_sync_batch_raw
    from sglang.srt.utils import require_mlp_sync, require_mlp_tp_gather

    if require_mlp_sync():
        prepare_mlp_sync_batch_raw(
            batch,
            model_runner=runner,
            get_idle_batch=cast(Any, None),
            disable_cuda_graph=True,
            require_mlp_tp_gather=require_mlp_tp_gather(),
            disable_overlap_schedule=True,
            offload_tags=set(),
        )


def _forward_stage(runner: Any, forward_batch: Any, stages: Any) -> tuple[Any, Any]:
    """Run a pipeline stage, as `scheduler_pp_mixin` (0.5.23); all stages get token and logits."""
    from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

    before = None if stages.is_first_rank else PPProxyTensors(stages.recv_tensor_dict())
    output = runner.forward(forward_batch, pp_proxy_tensors=before).logits_output
    last = stages.world_size - 1
    sampled: Any = None
    if stages.is_last_rank:
        token = runner.sample(output, forward_batch)
        sampled = {"token": token, "logits": output.next_token_logits.clone()}
    else:
        stages.send_tensor_dict(output.tensors)
    sampled = stages.broadcast_tensor_dict(sampled, src=last)
    return sampled["token"], sampled["logits"]


class _NoCache(SimpleNamespace):
    """The parts of a prefix cache that a batch asks for, with nothing cached."""

    def __init__(self, runner: Any) -> None:
        super().__init__(
            page_size=runner.page_size,
            device=runner.device,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        )

    def supports_swa(self) -> bool:
        return False

    def supports_mamba(self) -> bool:
        return False

    def is_chunk_cache(self) -> bool:
        return False

    def is_tree_cache(self) -> bool:
        return True

    def supports_prefix_sharing(self) -> bool:
        return True

    def maybe_hand_to_session(self, req: Any) -> None:
        pass

    def evict(self, params: Optional[Any]) -> None:
        pass
