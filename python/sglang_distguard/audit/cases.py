"""The default cases of an audit: small models, some of them with more features switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_distguard.audit.actions import ACTIONS
from sglang_distguard.audit.runs import Subject
from sglang_distguard.audit.serving import SERVERS
from sglang_distguard.hooks.releases import ALL, Span, installed_version

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """Two runners of one checkpoint and with different dtypes, that generate or embed.

    Attributes:
        name: shown in messages.
        model: folder of the checkpoint.
        settings: ``ServerArgs`` fields that override the recipe's for both runners (JSON values).
        actions: what each runner does in addition; keys of ``ACTIONS``.
        graphs: whether both runners capture and replay decode graphs.
        generates: whether the model generates; else a prefill gives embeddings or scores.
        items: the catalog's architecture whose images or sounds the prompts have; "" for text only.
        runs: how it runs: keys of ``processes.HOW``.
        server: what each runner belongs to, and serves: a key of ``SERVERS``; "" for a runner alone.
        detailed: whether each phase is observed, or only the ends of building and computing.
    """

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    actions: tuple[str, ...] = ()
    graphs: bool = False
    generates: bool = True
    items: str = ""
    runs: tuple[str, ...] = ("alone", "together")
    server: str = ""
    detailed: bool = True

    def subject(self) -> Subject:
        """The subject to run, in a process that has imported SGLang."""
        if self.server:
            return self._serving()
        settings = {**(_graphs() if self.graphs else {}), **self.settings}

        def build(number: int, after: Callable[[str], None]) -> Any:
            from sglang_distguard.testing import server_args, steps

            args = server_args(self.model, **{"dtype": _DTYPES[number], **settings})
            return steps.build(args, after=after)

        return Subject(build, self._compute)

    def _serving(self) -> Subject:
        server = SERVERS[self.server]()

        def build(number: int, after: Callable[[str], None]) -> Any:
            from sglang_distguard.testing import server_args

            settings = {"dtype": _DTYPES[number], **server.settings, **self.settings}
            return server.build(server_args(self.model, **settings), after)

        def compute(runner: Any, number: int, **how: Any) -> None:
            server.serve(runner, **{"activate": nullcontext, "after": lambda phase: None, **how})

        return Subject(build, compute, server.drafts)

    def _compute(self, runner: Any, number: int, **how: Any) -> None:
        from sglang_distguard.testing import steps
        from sglang_distguard.testing.catalog import CATALOG

        if not self.generates:
            steps.embed(runner, **how)
            return
        if self.items:
            prompts = CATALOG[self.items].prompts()
            items = [it.item for it in prompts]
            steps.generate(runner, [it.ids for it in prompts], items=items, **how)
        else:
            steps.generate(runner, **how)
        for name in self.actions:
            ACTIONS[name](runner, **how)


def _graphs() -> Mapping[str, Any]:
    import torch

    from sglang_distguard.testing import graphs

    if torch.cuda.is_available():
        return graphs.CUDA_GRAPHS
    graphs.allow_cpu_graphs()
    return graphs.CPU_GRAPHS


def everything(model_of: Callable[[str], Path]) -> Iterator[Case]:
    """The cases that an audit runs by default.

    They are every small model as SGLang runs it by default, and features that this leaves out and
    a runner can reach: graphs, switches, new weights, sampling. One small model, the switches and
    the schedulers are observed in detail; what else is restored between phases shows in the lines
    that ran.

    Args:
        model_of: returns the checkpoint of an architecture of ``testing.catalog``.
    """
    from sglang_distguard.testing import ARCHITECTURES
    from sglang_distguard.testing.catalog import CATALOG

    for name in ARCHITECTURES:
        yield Case(name, str(model_of(name)), detailed=name == "llama")
    pooled: dict[str, Any] = {"generates": False, "runs": ("together",), "detailed": False}
    for name in POOLED:
        yield Case(name, str(model_of(name)), CATALOG[name].overrides, **pooled)
    for name in MULTIMODAL:
        yield Case(name, str(model_of(name)), items=name, runs=("together",), detailed=False)
    import torch

    llama, moe, gpt2 = (str(model_of(name)) for name in ("llama", "qwen3_moe", "gpt2"))
    yield Case("llama with graphs", llama, graphs=True, detailed=False)
    yield Case("qwen3_moe with switches", moe, _switches(), tuple(ACTIONS))
    for server in SERVERS:
        draft = {"speculative_draft_model_path": llama} if server == "drafting worker" else {}
        how: dict[str, Any] = {"runs": ("together",), "detailed": server == "scheduler"}
        yield Case(f"two of llama's {server}s", llama, draft, server=server, **how)
    if torch.cuda.is_available():  # a CPU supports none of these (0.5.23)
        recording = {
            "expert_distribution_recorder_mode": "stat",
            "enable_return_routed_experts": True,
        }
        deterministic = {"enable_deterministic_inference": True}
        yield Case("gpt2, deterministic, with graphs", gpt2, deterministic, graphs=True)
        yield Case("llama with LoRA and graphs", llama, _LORA, graphs=True)
        yield Case("llama in fp8 with graphs", llama, {**_HALF, "quantization": "fp8"}, graphs=True)
        yield Case("qwen3_moe recorded, with graphs", moe, {**_HALF, **recording}, graphs=True)


def short(model_of: Callable[[str], Path]) -> Iterator[Case]:
    """What a test has time for: the runs of ``everything`` that are observed in detail.

    One runs alone with plain SGLang, and those with more switches or a scheduler with the guard. The
    one with switches is observed at the ends of building and computing only: it has most phases.
    """
    for case in everything(model_of):
        if case.detailed:
            is_plain = not (case.settings or case.server)
            runs = ("alone",) if is_plain else ("together",)
            yield replace(case, runs=runs, detailed=not case.settings)


#: An encoder, an embedding model, and a reward model.
POOLED = ("bert", "llama_embedding", "qwen3_reward")
#: A model of images and one of sounds.
MULTIMODAL = ("qwen2_vl", "qwen2_audio")
_HALF = {"dtype": "bfloat16"}
_LORA = {
    **_HALF,
    "enable_lora": True,
    "max_lora_rank": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
}
#: Switches of 0.5.23 that a CPU supports and that reach code which no other case reaches.
#: Each was also tried alone.
_SWITCHES = {
    "show_time_cost": True,
    "weight_loader_prefetch_checkpoints": True,
    "enable_custom_logit_processor": True,
    "enable_return_hidden_states": True,
    "enable_tf32_matmul": True,
    "enable_fp32_lm_head": True,
    "enable_metrics": True,
    "ep_dispatch_algorithm": "dynamic",
    "ep_num_redundant_experts": 4,
    "cpu_offload_gb": 1,
    "enable_watermark": True,
    "page_size": 16,
}
#: The releases in which a CPU supports a switch. 0.5.21 knows no watermarks, and takes memory for
#: pages of several tokens with a Triton kernel.
_NEEDS = {
    "enable_watermark": Span("0.5.22"),
    "page_size": Span("0.5.22"),
}


def _switches() -> dict[str, Any]:
    release = installed_version()
    return {name: it for name, it in _SWITCHES.items() if _NEEDS.get(name, ALL).has(release)}
