"""Unmanaged globals: caches hold results valid for every runner; changes alter no logits."""

from __future__ import annotations

import contextvars
import copy
import gc
import importlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from references import reference
from sglang_distguard.audit.values import is_cache
from sglang_distguard.hooks import process_globals, releases
from sglang_distguard.hooks.process_globals import How
from sglang_distguard.hooks.releases import installed_version
from sglang_distguard.testing import bit_equal, generate, server_args

Model = Callable[..., Path]

ROWS = process_globals.of_release(installed_version())
UNMANAGED = [row for row in ROWS if row.how is How.UNMANAGED]


def caches() -> Iterator[tuple[str, Any]]:
    for row in UNMANAGED:
        if row.module.startswith("sglang."):
            thing = getattr(importlib.import_module(row.module), row.name, None)
            if is_cache(thing):
                yield f"{row.module}.{row.name}", thing


@contextmanager
def two_runners(model: Model) -> Iterator[list[Any]]:
    """Two runners of different architectures and dtypes."""
    built = [
        sglang_distguard.build_runner(server_args(model("gpt2")), name="first"),
        sglang_distguard.build_runner(server_args(model("qwen3_moe"), dtype="bfloat16")),
    ]
    try:
        yield built
    finally:
        for runner in built:
            sglang_distguard.close(runner)


def arguments_of(name: str) -> list[Any]:
    """Arguments for a cache that takes some; its result may depend on nothing else."""
    from sglang.kernels.spec import KernelBackend
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
    from sglang.srt.server_args import ServerArgs

    if "arg_groups" in name:
        return [ServerArgs]
    return {
        "import_model_classes": ["sglang.srt.models"],
        "_cache_from_str": [DisallowedTokensLogitsProcessor.to_str()],
        "sanity_check_mm_pad_shift_value": [1000],
        "print_info_once": ["a line"],
        "get_lora_configs": ["shrink", 64, 8, 1],
        "_resolve": ["kvcache.reshape_and_cache_flash", KernelBackend.TRITON],
    }.get(name.rpartition(".")[2], [])


def test_every_runner_would_compute_the_cached_result_again(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = "sglang.kernels.ops.lora.dense.lora_tuning_config"
    if releases.has(installed_version(), lora, "get_lora_configs"):
        monkeypatch.setattr(f"{lora}.get_device_name", lambda: "some GPU")
    looked_at, told_apart = [], []
    with two_runners(model) as runners:
        for name, cache in caches():
            arguments = arguments_of(name)
            try:
                remembered = cache(*arguments)
            except TypeError:
                told_apart.append(name)  # needs arguments, which distinguish its results
                continue
            for runner in runners:
                with sglang_distguard.activate(runner):
                    assert cache.__wrapped__(*arguments) == remembered, name
            looked_at.append(name)
    assert len(looked_at) >= 20, looked_at
    assert [name for name in told_apart if "arg_groups" not in name] == [], told_apart


class Switched:
    """Changes each unmanaged global that is no cache, as another runner or its libraries could."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._monkeypatch, self._folder = monkeypatch, folder
        self.done: set[tuple[str, str]] = set()
        self._threads = number_of_threads()
        self._operators = 0
        #: Takes back what ``monkeypatch`` cannot.
        self.undo = ExitStack()

    def all(self) -> None:
        for row in UNMANAGED:
            if not is_cache(found(row)):
                change = self._of_process(row.module, row.name)
                if change is None:
                    change = self._of_sglang(row.module, row.name)
                change()
                self.done.add((row.module, row.name))

    def _are_as_many_threads_as_before(self) -> None:
        """On a CPU the number of threads affects the bits, so a runner must not change it."""
        assert number_of_threads() == self._threads

    def _order_attentions(self) -> None:
        import torch

        now = torch._C._get_sdp_priority_order()
        self.undo.callback(torch._C._set_sdp_priority_order, now)
        torch._C._set_sdp_priority_order([*now[-1:], *now[:-1]])

    def _of_process(self, module: str, name: str) -> Callable[[], Any] | None:
        import torch
        from tqdm import tqdm

        level = self._monkeypatch.setattr
        groups: Any = torch.distributed.distributed_c10d._world.pg_group_ranks
        if module == "logging" and name != "_handlerList":
            return lambda: level(logging.getLogger(name), "level", 10)
        if "operators" in self._reason(module, name):
            return self._register_an_operator
        known = self._of_libraries(module, name)
        if known is not None:
            return known
        return {
            ("torch", "rng"): lambda: torch.rand(7),
            ("threading", "threads:tqdm._monitor.TMonitor"): lambda: list(
                tqdm(range(2), file=(self._folder / "bar").open("w"))
            ),
            ("threading", "threads:concurrent.futures.thread._worker"): lambda: level(
                self, "pool", started_pool(), raising=False
            ),
            ("torch", "default_device"): lambda: self.undo.enter_context(torch.device("cpu")),
            ("torch", "sdp_priority_order"): self._order_attentions,
            ("os", "environ['TRITON_PTXAS_PATH']"): (
                lambda: self._monkeypatch.setenv("TRITON_PTXAS_PATH", "/made/up")
            ),
            ("torch", "num_threads"): self._are_as_many_threads_as_before,
            ("os", "environ['FLASHINFER_CUDA_ARCH_LIST']"): lambda: self._monkeypatch.setenv(
                "FLASHINFER_CUDA_ARCH_LIST", "9.0a"
            ),
            ("torch.distributed.distributed_c10d._world", "pg_group_ranks"): (
                lambda: self._monkeypatch.setitem(groups, "made up", {0: 0})
            ),
            ("sys", "path"): lambda: self._monkeypatch.syspath_prepend(self._folder),
            ("os", "environ['_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR']"): (
                lambda: self._monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "1")
            ),
        }.get((module, name))

    @staticmethod
    def _reason(module: str, name: str) -> str:
        row = process_globals.find(module, name)
        assert row is not None
        return row.reason

    def _register_an_operator(self) -> None:
        import torch

        self._operators += 1
        name = f"made_up_{id(self)}::nothing_{self._operators}"

        def nothing(x: Any) -> Any:
            return x.clone()

        torch.library.custom_op(name, nothing, mutates_args=(), schema="(Tensor x) -> Tensor")

    def _of_libraries(self, module: str, name: str) -> Callable[[], Any] | None:
        import atexit
        import random
        import sys

        import numpy
        import torch
        import transformers
        from sglang.kernels.jit.utils import arch
        from torch import _jit_internal
        from torch._library import fake_class_registry
        from transformers import cache_utils, modeling_utils
        from transformers.models.auto import configuration_auto, modeling_auto
        from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

        patch: Any = self._monkeypatch
        attention: Any = modeling_utils.ALL_ATTENTION_FUNCTIONS
        models: Any = modeling_auto.MODEL_MAPPING
        limit = sys.getrecursionlimit()

        def no_gradients() -> None:
            self.undo.enter_context(torch.no_grad())

        def freeze() -> None:
            self.undo.callback(gc.unfreeze)
            gc.freeze()

        def recurse() -> None:
            self.undo.callback(sys.setrecursionlimit, limit)
            sys.setrecursionlimit(max(limit, 2000))

        table: dict[str, Callable[[], Any]] = {
            "gc": freeze,
            "random": random.random,
            "numpy": numpy.random.rand,
            "numpy.random.mtrand": numpy.random.rand,
            "torch.cuda": lambda: torch.manual_seed(7),
            "torch.mtia": lambda: torch.manual_seed(8),
            "torch.xpu": lambda: torch.manual_seed(9),
            "psutil": lambda: patch.setattr(f"psutil.{name}", 1),
            "torch.grad_mode": no_gradients,
            "torch.get_device_module": lambda: torch.get_device_module("cpu"),
            "torch._jit_internal": (
                lambda: patch.setitem(vars(_jit_internal)[name], "made up", {})
            ),
            "torch._opaque_base": lambda: patch.setattr(
                f"{module}.{name}", fake_class_registry.FakeScriptObject
            ),
            "torch.nn.modules.module": lambda: patch.setattr(
                torch.nn.Module, "___needs_generation_tag_patch", True, raising=False
            ),
            "transformers.models.auto.configuration_auto": (
                lambda: configuration_auto.CONFIG_MAPPING["mamba"]
            ),
            "transformers.models.auto.modeling_auto": (
                lambda: patch.setitem(models._extra_content, int, int)
            ),
            "transformers.modeling_utils": (
                lambda: patch.setitem(attention._local_mapping, "made up", int)
            ),
            "transformers.modeling_utils._CAN_RECORD_REGISTRY": (
                lambda: patch.setitem(_CAN_RECORD_REGISTRY, "made up", {})
            ),
            "transformers.utils": lambda: vars(transformers.utils)[name](),
            "transformers.cache_utils": (
                lambda: patch.setitem(vars(cache_utils)[name], "made up", int)
            ),
            "transformers.models.qwen2_audio.modeling_qwen2_audio": lambda: patch.setattr(
                Qwen2AudioEncoder, name.rpartition(".")[2], True, raising=False
            ),
            "transformers": lambda: patch.setattr(
                transformers.ParakeetFeatureExtractor, "_backends", ["made up"], raising=False
            ),
            "concurrent.futures.thread": lambda: patch.setattr(
                self, "pool", started_pool(), raising=False
            ),
            "atexit": lambda: atexit.register(int),
            "logging": logging.StreamHandler,
            "sys.getrecursionlimit": recurse,
            "sglang.kernels.jit.utils.arch": (
                lambda: getattr(arch, name)() if name != "_CUDA_ARCH" else None
            ),
            "pynvml": lambda: patch.setattr(f"pynvml.{name}", {}),
            **dict.fromkeys(
                _CACHES, lambda: getattr(importlib.import_module(module), name).cache_clear()
            ),
            **dict.fromkeys(
                (
                    "threading.threads:sglang.srt.utils.watchdog.WatchdogRaw._watchdog_thread",
                    "threading.threads:torch._inductor.compile_worker.subproc_pool.SubprocPool."
                    "_read_thread",
                    "threading.threads:torch._inductor.compile_worker.timer.Timer.check",
                ),
                lambda: patch.setattr(self, "pool", started_pool(), raising=False),
            ),
        }
        return table.get(f"{module}.{name}", table.get(module))

    def _of_sglang(self, module: str, name: str) -> Callable[[], Any]:
        *path, last = name.split(".")
        owner: Any = importlib.import_module(module)
        for part in path:
            owner = getattr(owner, part)
        now = vars(owner).get(last)
        changed = {
            "_CUDA_ARCH": lambda: None,
            "_deferred_finalize_info_logged": lambda: not now,
            "show_time_cost": lambda: not now,
            "_jit_act_max_vec_bytes": lambda: 16,
            "_NUM_CU": lambda: 132,
            "_FP8_SCALED_MM": lambda: copy.copy(now),
            "_chunked_lora_expand_kernel": lambda: copy.copy(now),
            "_chunked_lora_shrink_kernel": lambda: copy.copy(now),
            "_logged_configs": lambda: {*now, "made up"},
            "global_diff_realtime_monotonic": lambda: now + 5,
            "_msgpack_decoder": lambda: None,
            "_allowed_media_domains": lambda: frozenset(["example.org"]),
            "_media_url_max_file_size_bytes": lambda: 1,
            "_can_set_experts_implementation_cached_value": lambda: True,
            "_CLAMP_POSITION": lambda: type(now)(),
            "ALLOC_LEN_PER_DECODE": lambda: 7,
            "copy_all_layer_kv_cache_cpu": lambda: copy.copy(now),
            "get_cpu_ids_by_node": lambda: copy.copy(now),  # no cache before 0.5.23
            **dict.fromkeys(
                _CONTEXT_VARIABLES, lambda: contextvars.ContextVar("made up", default=None)
            ),
            "apply_rotary_pos_emb": lambda: copy.copy(now),
            "apply_rotary_pos_emb_native": lambda: copy.copy(now),
            "hf_to_sglang_mapper": lambda: copy.copy(now),
            "SPLIT_OPS": lambda: [*now, "made.up"],
            "_all_types": lambda: (*now, int),
            **dict.fromkeys(_COMPILED, lambda: copy.copy(now)),
        }.get(last, lambda: _with_one_more(now))
        return lambda: self._monkeypatch.setattr(owner, last, changed(), raising=False)


#: Modules of other libraries whose rows are caches, which may be asked again.
_CACHES = (
    *("flashinfer.decode", "flashinfer.norm", "flashinfer.prefill", "flashinfer.jit.cpp_ext"),
    *("flashinfer.utils", "jinja2.environment"),
)
_CONTEXT_VARIABLES = (
    *("_current_capture_var", "_current_stream_var", "_forked_streams_var"),
    *("_current_batch", "_current"),
)
#: Caches of SGLang's `cache_once`, which has them in a closure: they are replaced by another.
_COMPILED = (
    *("_anchor_roots", "_environment_fingerprint", "_target_tag", "cuda_home"),
    *("device_compiler_path", "host_compiler_path", "toolkit_home", "activation_module"),
    *("_jit_clamp_position_module", "_jit_kvcache_module", "can_use_store_cache"),
    *("can_use_fused_inplace_qknorm", "_jit_fused_rope_module", "_jit_gptq_marlin_module"),
    "_jit_gptq_marlin_repack_module",
)


def number_of_threads() -> int:
    import torch

    return torch.get_num_threads()


def started_pool() -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(1)
    pool.submit(int).result()
    return pool


def _with_one_more(table: Any) -> Any:
    more = copy.copy(table)
    more["made up"] = None
    return more


def found(row: process_globals.Treatment) -> Any:
    if not row.module.startswith("sglang."):
        return None
    thing = importlib.import_module(row.module)
    for part in row.name.split("."):
        thing = getattr(thing, part, None)  # type: ignore[assignment]
    return thing


def test_changes_of_unmanaged_globals_change_no_logits(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    switched = Switched(monkeypatch, tmp_path)
    alone = [
        reference(model(name), dtype).logits
        for name, dtype in (("gpt2", "float32"), ("qwen3_moe", "bfloat16"))
    ]
    with switched.undo, two_runners(model) as runners:  # built before
        switched.all()
        for runner, expected in zip(runners, alone, strict=True):
            made = generate(runner, activate=sglang_distguard.activate)
            assert bit_equal(made.logits, expected)
    with two_runners(model) as runners:  # built afterwards
        for runner, expected in zip(runners, alone, strict=True):
            made = generate(runner, activate=sglang_distguard.activate)
            assert bit_equal(made.logits, expected)
    caches_of = {(row.module, row.name) for row in UNMANAGED if is_cache(found(row))}
    assert switched.done | caches_of == {(row.module, row.name) for row in UNMANAGED}
