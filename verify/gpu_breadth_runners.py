"""Sections of ``gpu_breadth.py`` whose subjects are runners: graphs, LoRA, quantisation, models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from gpu_breadth_common import (
    NATIVE,
    ROUNDS,
    Counted,
    Section,
    arguments,
    at_once,
    checkpoint,
    has_card,
    install,
    is_fx_flag_of_the_process,
    made_of_llama,
    same,
    use_torchs_own_operations,
    wrong_of,
)

Activate = Callable[[Any], Any]
Compute = Callable[[Any, Activate], Any]
#: Gives the ``ServerArgs`` fields of the runner with this seed.
Settings = Callable[[Path, int], Mapping[str, Any]]
STEPS = 8
RANK = 8
#: One entry for each replay of a prefill graph in this process.
_replays: list[int] = []


def generated(runner: Any, activate: Activate, **how: Any) -> Any:
    """The logits of two prompts as one batch, and of one prompt, each with decode steps."""
    from sglang_distguard.testing import steps

    made = [
        steps.generate(runner, prompts, STEPS, activate=activate, **how).logits
        for prompts in (steps.PROMPTS, steps.PROMPTS[:1])
    ]
    return list(made)


def prefilled(runner: Any, activate: Activate) -> Any:
    """As ``generated``; raise an error unless each prefill replays a graph."""
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

    graphs = runner.prefill_cuda_graph_runner
    if not isinstance(graphs, PrefillCudaGraphRunner):
        raise RuntimeError(f"no prefill graph was captured: {type(graphs).__name__}")
    if "execute" not in vars(graphs):
        execute = graphs.execute

        def counted(*args: Any, **kwargs: Any) -> Any:
            _replays.append(id(graphs))
            return execute(*args, **kwargs)

        setattr(graphs, "execute", counted)
    before = _replays.count(id(graphs))
    made = generated(runner, activate)
    if _replays.count(id(graphs)) != before + len(made):
        raise RuntimeError("a prefill ran without its graph")
    return made


def compiled(runner: Any, activate: Activate) -> Any:
    """As ``generated``; raise an error unless torch.compile has compiled something."""
    from torch._dynamo.utils import counters

    if not counters["stats"]["unique_graphs"]:
        raise RuntimeError("torch.compile has compiled nothing")
    return generated(runner, activate)


def adapted(runner: Any, activate: Activate) -> Any:
    """As ``generated``, with the runner's adapter and without; the two must differ."""
    (adapter,) = runner.lora_manager.lora_refs
    made = [generated(runner, activate, request={"lora_id": it}) for it in (adapter, None)]
    if same(*made):
        raise RuntimeError("the adapter has changed nothing")
    return made


def embedded(runner: Any, activate: Activate) -> Any:
    """The embeddings of two prompts as one batch, and of one prompt."""
    from sglang_distguard.testing import steps

    return [
        steps.embed(runner, prompts, activate=activate)
        for prompts in (steps.PROMPTS, steps.PROMPTS[:1])
    ]


def seen(runner: Any, activate: Activate, *, architecture: str) -> Any:
    """The logits of two prompts with an image each."""
    from sglang_distguard.testing import steps
    from sglang_distguard.testing.catalog import CATALOG

    prompts = CATALOG[architecture].prompts()
    how: dict[str, Any] = {"items": [it.item for it in prompts], "activate": activate}
    return steps.generate(runner, [it.ids for it in prompts], STEPS, **how).logits


def on_card(settings: Mapping[str, Any]) -> Settings:
    """These settings on a GPU, none on a CPU."""
    return lambda models, seed: settings if has_card() else {}


def _compiling(models: Path, seed: int) -> Mapping[str, Any]:
    from sglang_distguard.testing import graphs

    compiling = {"enable_torch_compile": True, "torch_compile_max_bs": 2}
    if has_card():
        return {**graphs.CUDA_GRAPHS, "disable_prefill_cuda_graph": True, **compiling}
    graphs.allow_cpu_graphs()
    return graphs.CPU_GRAPHS


def _prefilling(backend: str) -> Settings:
    decode = {"disable_cuda_graph": False, "cuda_graph_bs_decode": [1, 2]}
    prefill = {"cuda_graph_backend_prefill": backend, "cuda_graph_bs_prefill": [32, 64]}
    # A whole graph has a fixed number of requests, and none for prefixes with Triton's attention.
    whole = {
        "cuda_graph_config": {"prefill": {"full_prefill_max_req": 2}},
        "disable_chunked_prefix_cache": True,
    }
    chosen = {**decode, "cuda_graph_max_bs_decode": 2, **prefill}
    return on_card({**chosen, **whole} if backend == "full" else chosen)


def _adapting(backend: str) -> Settings:
    def settings(models: Path, seed: int) -> Mapping[str, Any]:
        from sglang.srt.lora.lora_registry import LoRARef

        adapter = LoRARef(lora_name="one", lora_path=str(_adapter(models, seed)), pinned=False)
        return {
            "enable_lora": True,
            "lora_backend": backend,
            "lora_paths": [adapter],
            "max_lora_rank": RANK,
            "max_loras_per_batch": 2,
            "lora_target_modules": ["q_proj", "v_proj"],
        }

    return settings


def _adapter(models: Path, seed: int) -> Path:
    """Return the folder of a LoRA adapter of Llama."""
    return made_of_llama(models, "adapters", seed, _write_adapter)


def _write_adapter(base: Path, weights: dict[str, Any], generator: Any, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            rows, columns = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                random = torch.randn(shape, generator=generator)
                tensors[f"{stem}.lora_{part}.weight"] = random * 0.1
    save_file(tensors, target / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (target / "adapter_config.json").write_text(json.dumps(config))


def _int8(models: Path, seed: int) -> Path:
    """Return the folder of a Llama with int8 projections, a scale for each row of the weights."""
    return made_of_llama(models, "int8", seed, _write_int8)


def _write_int8(base: Path, weights: dict[str, Any], _generator: Any, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", target)


def section(
    name: str,
    architecture: str,
    compute: Compute = generated,
    settings: Settings = lambda models, seed: {},
    *,
    folder: Callable[[Path, int], Path] | None = None,
    also: Callable[[Path, int], object] | None = None,
    prepare: Callable[[], object] = use_torchs_own_operations,
    **others: Any,
) -> Section:
    """A section of two runners.

    Args:
        name: of the section.
        architecture: of the catalog.
        compute: what each runner does.
        settings: of each runner, beside the recipe's and the catalog's.
        folder: makes the checkpoint; default: that of the catalog.
        also: makes what else is needed.
        prepare: called in each process before a runner is built, and after the guard's install.
        **others: of ``Section``.
    """
    found = folder or partial(_folder, architecture)

    def args(models: Path, seed: int) -> Any:
        from sglang_distguard.testing.catalog import CATALOG

        given = {**CATALOG[architecture].overrides, **settings(models, seed)}
        return arguments(found(models, seed), **given)

    def make(models: Path, seed: int) -> None:
        found(models, seed)
        if also is not None:
            also(models, seed)

    return Section(
        name,
        make,
        partial(_alone, args, compute, prepare),
        partial(_guarded, args, compute, prepare),
        **others,
    )


def _folder(architecture: str, models: Path, seed: int) -> Path:
    return checkpoint(models, architecture, seed)


def _alone(
    args: Callable[[Path, int], Any],
    compute: Compute,
    prepare: Callable[[], object],
    models: Path,
    seed: int,
) -> Any:
    from sglang_distguard.testing import steps

    prepare()
    return compute(steps.build(args(models, seed)), nullcontext)


def _guarded(
    args: Callable[[Path, int], Any],
    compute: Compute,
    prepare: Callable[[], object],
    models: Path,
    expected: Sequence[Any],
) -> Counted:
    import sglang_distguard

    install()
    prepare()

    def build(seed: int) -> Any:
        return sglang_distguard.build_runner(args(models, seed), name=f"runner {seed}")

    runners = at_once([partial(build, seed) for seed in range(len(expected))])
    notes = []
    if is_fx_flag_of_the_process():
        for runner in runners:
            compute(runner, sglang_distguard.activate)
        notes.append("once in a row before")

    def wrong(seed: int) -> int:
        ask = partial(compute, runners[seed], sglang_distguard.activate)
        return wrong_of(ask, expected[seed])

    found = at_once([partial(wrong, seed) for seed in range(len(runners))])
    for runner in runners:
        sglang_distguard.close(runner)
    if _replays:
        notes.append(f"{len(_replays)} replays of prefill graphs")
    return Counted(sum(found), len(found) * ROUNDS, ", ".join(notes))


def _fp8(name: str) -> Section:
    return section(
        name, "llama", settings=on_card({"quantization": name}), needs_cuda=True, note=NATIVE
    )


def sections() -> list[Section]:
    """All sections whose subjects are runners."""
    card: dict[str, Any] = {"needs_cuda": True, "note": NATIVE}
    native: dict[str, Any] = {"note": NATIVE}
    experts = on_card({"moe_runner_backend": "triton"})
    # Without it, SGLang lets inductor choose kernels by their speed, so that bits differ.
    default = {"SGLANG_TORCH_COMPILE_MODE": "default"}
    return [
        section("prefill_graphs", "llama", prefilled, _prefilling("breakable"), **card),
        section("prefill_graphs_full", "llama", prefilled, _prefilling("full"), **card),
        section("compiled", "opt", compiled, _compiling, environment=default, limit=150.0),
        section("lora_csgmv", "llama", adapted, _adapting("csgmv"), also=_adapter, **card),
        section("lora_triton", "llama", adapted, _adapting("triton"), also=_adapter, **card),
        _fp8("fp8"),
        _fp8("w8a8_fp8"),
        section(
            "w8a8_int8",
            "llama",
            settings=on_card({"quantization": "w8a8_int8"}),
            folder=_int8,
            **card,
        ),
        section("moe", "mixtral", settings=experts, **native),
        section("moe_qwen3", "qwen3_moe", settings=experts, **native),
        section("embedding", "llama_embedding", embedded, **native),
        section("encoder", "bert", embedded),
        section(
            "vision",
            "qwen2_vl",
            partial(seen, architecture="qwen2_vl"),
            on_card({"mm_attention_backend": "triton_attn"}),
            **native,
        ),
    ]
