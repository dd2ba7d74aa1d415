"""Build runners that are ready to forward, one or many at once, with SGLang's own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional, Union

from sglang_distguard import _core
from sglang_distguard.api.activation import activate
from sglang_distguard.api.validation import check, check_ranks
from sglang_distguard.config import settings
from sglang_distguard.config.checks import check_flag, check_whole, shown
from sglang_distguard.config.naming import name_of_model
from sglang_distguard.config.ports import free_port
from sglang_distguard.context import generation
from sglang_distguard.context.current_device import keeping_current
from sglang_distguard.distributed.coordinators import default_process_group
from sglang_distguard.distributed.owned_groups import destroy_of
from sglang_distguard.distributed.ranks.agreement import building, built
from sglang_distguard.errors import DistGuardError, forget_frames
from sglang_distguard.process.installation import is_installed
from sglang_distguard.runner import streams, weights
from sglang_distguard.runner.budget import release_memory
from sglang_distguard.runner.handle import release_failed

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True)
class BuildRequest:
    """A request for one runner, for ``build_runners``.

    ``build_runners`` checks the fields when it uses them.

    Attributes:
        server_args: see ``build_runner``, as for all fields.
        name: default: from the model's path, with the index of the request.
        gpu_id: index of the device.
        target: build a draft runner for this runner.
        share_weights_with: a runner of the same checkpoint.
        options: arguments of ``ModelRunner``, the ``**options`` of ``build_runner``.
        timeout: seconds that one wait of this build may take.
        memory: what the runner may use of its device, in bytes or as a fraction.
    """

    server_args: ServerArgs
    name: Optional[str] = None
    gpu_id: int = 0
    target: Optional[ModelRunner] = None
    share_weights_with: Optional[ModelRunner] = None
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: Optional[float] = None
    memory: Union[int, float, None] = None


@dataclass(frozen=True)
class BuildResult:
    """The result of one request: ``runner`` or ``error``, never both.

    Attributes:
        name: the runner's name, also when its build failed.
        runner: the runner, or None when its build failed.
        error: the exception that the build raised, or None.
        seconds: duration of the build, in seconds.
    """

    name: str
    runner: Optional[ModelRunner]
    error: Optional[BaseException]
    seconds: float

    def unwrap(self) -> ModelRunner:
        """Return the runner, or raise the exception that its build raised."""
        if self.error is not None:
            raise self.error
        assert self.runner is not None
        return self.runner


def build_runner(
    server_args: ServerArgs,
    *,
    name: Optional[str] = None,
    gpu_id: int = 0,
    nccl_port: Optional[int] = None,
    target: Optional[ModelRunner] = None,
    share_weights_with: Optional[ModelRunner] = None,
    timeout: Optional[float] = None,
    memory: Union[int, float, None] = None,
    **options: Any,
) -> ModelRunner:
    """Build one ModelRunner with SGLang's own steps, ready to ``forward``.

    Publishes ``server_args``, initialises the parallel runtime (or joins the existing one), loads
    the model, and allocates its memory pool, attention backends and graphs.

    Args:
        server_args: SGLang's settings of this runner.
        name: name in errors, events and ``snapshot()``; several runners may have the same name.
            Default: from the model's path.
        gpu_id: index of the device (also on CPU, where it is the NUMA node).
        nccl_port: TCP port, 1 to 65535, for a world that has to be initialised. Default: a free
            port.
        target: build a draft runner (``is_draft_worker=True``) for this runner. Nothing is
            initialised, and the draft runner uses the target's scope.
        share_weights_with: a runner of the same checkpoint and settings. The new one loads as
            usual; then its parameters are compared with that runner's, bit for bit, and both use
            one copy. Weights that others share are not changed: see ``detach_weights``.
        timeout: seconds that one wait of this build may take; None keeps the setting in force.
        memory: what the runner may use of its device for weights and key-value cache, in bytes
            (int) or as a fraction of the device (float). Default: ``mem_fraction_static`` of what
            the device had free when its first runner was built, as if this one were alone there.
        **options: passed to ``ModelRunner``.

    Returns:
        The runner.

    Raises:
        TypeError: an argument is of the wrong type, ``target`` was not built under the guard, or
            an option is not a parameter of ``ModelRunner``.
        ValueError: an argument, or a size in ``server_args``, is out of range.
        NotSupported: ``server_args`` asks for several ranks (``tp_size`` times ``pp_size``), and
            torch.distributed is not initialised with that many ranks. Or weights were to be shared
            with settings that move them later (LoRA, offloading, EPLB, torch_memory_saver …), with
            several ranks, or by a draft runner.
        NotEnoughMemory: less of the device is left than is asked for; nothing was loaded. Or the
            weights take more than ``memory``.
        SpecMismatch: the weights that were to be shared differ, or existing state does.
        DistGuardError: ``install()`` was not called, or ``target`` is closed; or a subclass for
            another reason (see ``errors``).
        Exceptions of SGLang for settings or files that it cannot use. No runner, scope or lease
        is left then. The world and the groups, if they were initialised by then, stay for reuse.
    """
    check(
        server_args,
        name=name,
        gpu_id=gpu_id,
        nccl_port=nccl_port,
        target=target,
        share_weights_with=share_weights_with,
        timeout=timeout,
        memory=memory,
        options=options,
    )
    if not is_installed():
        raise DistGuardError("build_runner needs the guard: call sglang_distguard.install() first")
    check_ranks(server_args)
    chosen = settings.current()
    named = settings.runner_scope(
        name if name is not None else chosen.name, timeout=timeout, memory=memory
    )
    # The caller's own execution stays as it is: values published here belong to the runner.
    sharing = weights.sharing_with(share_weights_with)
    own = _core.run_as(_core.current_execution())
    with named, sharing, keeping_current(), own, _core.owning_environment():
        try:
            if target is not None:
                with activate(target), building(asks=True):
                    draft = _construct(
                        server_args, gpu_id, nccl_port, {"is_draft_worker": True, **options}
                    )
                    streams.share(draft, target)
                    return draft
            with building(asks=True):
                _initialise(server_args, gpu_id, nccl_port)
                with streams.while_building(gpu_id) as stream:
                    runner = _construct(server_args, gpu_id, nccl_port, options)
                    streams.give(runner, stream)
                return runner
        except BaseException as error:
            forget_frames(error)
            release_memory()
            raise


def build_runners(
    requests: Iterable[BuildRequest | ServerArgs],
    *,
    max_workers: Optional[int] = None,
    progress: bool = True,
) -> list[BuildResult]:
    """Build several runners concurrently from worker threads.

    Args:
        requests: the runners to build; a bare ``ServerArgs`` is a request with defaults.
        max_workers: number of threads, at least 1. Default: one per request, at most 32.
        progress: show a progress bar on stderr (only when that is a terminal).

    Returns:
        One result per request, in order. A failed build affects only its own result.

    Raises:
        TypeError, ValueError: an argument, or a field of a request, is of the wrong type or out of
            range. A note on the error names the request. Nothing was built.
        DistGuardError: the ``target`` of a request is closed. Nothing was built.
    """
    check_flag("progress", progress)
    if max_workers is not None:
        check_whole("max_workers", max_workers, least=1)
    wanted = _checked_requests(requests)
    if not wanted:
        return []
    workers = max_workers if max_workers is not None else min(len(wanted), 32)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="distguard-build")
    try:
        # A thread does not inherit the caller's runner_scope by itself.
        futures = [
            pool.submit(copy_context().run, _attempt, request, index)
            for index, request in enumerate(wanted)
        ]
        _show_progress(futures, progress)
        return [future.result() for future in futures]
    finally:
        # After Ctrl-C do not wait for builds that still run; cancel those that have not begun.
        pool.shutdown(wait=False, cancel_futures=True)


def _attempt(request: BuildRequest, index: int) -> BuildResult:
    import time

    name = request.name or f"{name_of_model(request.server_args)}-{index}"
    start = time.perf_counter()
    runner, failure = None, None
    try:
        runner = build_runner(
            request.server_args,
            name=name,
            gpu_id=request.gpu_id,
            target=request.target,
            share_weights_with=request.share_weights_with,
            timeout=request.timeout,
            memory=request.memory,
            **request.options,
        )
    except BaseException as error:
        error.add_note(f"while building runner {name!r}")
        failure = error
    return BuildResult(name, runner, failure, time.perf_counter() - start)


def _checked_requests(requests: Iterable[BuildRequest | ServerArgs]) -> list[BuildRequest]:
    """All of ``requests``, each with arguments that ``build_runner`` will accept."""
    if not isinstance(requests, Iterable):
        raise TypeError(f"requests must be BuildRequests or ServerArgs, not {shown(requests)}")
    wanted = []
    for index, given in enumerate(requests):
        request = given if isinstance(given, BuildRequest) else BuildRequest(given)
        try:
            if not isinstance(request.options, Mapping):
                raise TypeError(f"options must be a mapping, not {shown(request.options)}")
            check(
                request.server_args,
                name=request.name,
                gpu_id=request.gpu_id,
                nccl_port=None,
                target=request.target,
                share_weights_with=request.share_weights_with,
                timeout=request.timeout,
                memory=request.memory,
                options=request.options,
            )
        except (TypeError, ValueError, DistGuardError) as error:
            error.add_note(f"in requests[{index}]; nothing was built")
            raise
        wanted.append(request)
    return wanted


def _show_progress(futures: Sequence[Any], progress: bool) -> None:
    """Wait for ``futures``, with a progress bar if tqdm is installed; sglang depends on it."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        wait(futures)
        return
    bar = tqdm(
        total=len(futures), desc="building runners", unit="runner", disable=not progress or None
    )
    with bar:
        for future in as_completed(futures):
            bar.set_postfix_str(future.result().name)
            bar.update()


def _initialise(server_args: ServerArgs, gpu_id: int, nccl_port: Optional[int]) -> None:
    """Publish, and initialise what a first ModelRunner needs (SGLang 0.5.23 `one_batch`)."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap

    configuration = generation.current()
    before, state = _core.current_scope(), configuration.snapshot()
    world = default_process_group()
    rank = 0 if world is None else world.rank()
    configuration.publish(server_args, world_rank=rank, gpu_id=gpu_id)
    scope = _core.current_scope()
    try:
        for configure in _process_configurations():
            configure()
        bootstrap.init_parallel_runtime(
            server_args=server_args,
            device=configuration.device(),
            dist_port=nccl_port or free_port(),
        )
        bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(server_args))
    except BaseException:
        # Only this thread uses the scope until a runner is constructed in it: restoring it cannot
        # affect another runner. Later it could: then SGLang's next publish replaces the context.
        destroy_of(scope)  # at once: other ranks may wait for this one in a collective
        if scope is before:
            configuration.restore(state)
        raise


def _process_configurations() -> list[Callable[[], None]]:
    """What `sglang.benchmark.one_batch._init_process_global_configs` (0.5.23) calls."""
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.layers.quantization.unquant import initialize_bf16_gemm_config

    return [
        initialize_moe_config,
        initialize_fp8_gemm_config,
        initialize_bf16_gemm_config,
        initialize_fp4_gemm_config,
    ]


def _construct(
    server_args: ServerArgs, gpu_id: int, nccl_port: Optional[int], options: Mapping[str, Any]
) -> ModelRunner:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner

    runner = ModelRunner(
        model_config=ModelConfig.from_server_args(
            server_args, is_draft_model=bool(options.get("is_draft_worker"))
        ),
        mem_fraction_static=generation.current().memory_fraction(),
        gpu_id=gpu_id,
        nccl_port=nccl_port or 0,
        server_args=server_args,
        **options,
    )
    try:
        runner.alloc_memory_pool()
        _make_embedding_cache(runner)
        runner.init_attention_backends()
        runner.init_cuda_graphs()
        built()
    except BaseException:
        release_failed(runner)
        raise
    return runner


def _make_embedding_cache(runner: ModelRunner) -> None:
    """Make the cache of what the model's encoder makes of items, as a Scheduler does (0.5.23).

    A draft uses its target's.
    """
    if runner.model_config.is_multimodal and not runner.is_draft_worker:
        from sglang.srt.environ import envs
        from sglang.srt.managers.mm_utils import init_mm_embedding_cache

        init_mm_embedding_cache(envs.SGLANG_VLM_CACHE_SIZE_MB.get() << 20)
