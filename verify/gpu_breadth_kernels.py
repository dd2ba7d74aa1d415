"""Sections of ``gpu_breadth.py`` whose kernels are compiled on the machine, with nvcc and ninja.

These are flashinfer's attention, SGLang's and flashinfer's norms, activations and rotary
embeddings, and products with weights of four bits. They need flashinfer's sources where flashinfer
is installed. The first processes of a section compile: four minutes were seen for flashinfer's
attention on 16 cores that did other work beside, and more than six for Marlin's products.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpu_breadth_common import (
    KERNELS,
    NATIVE,
    Section,
    leave_out_dual_gemm,
    made_of_llama,
)
from gpu_breadth_runners import Activate, generated, on_card, section

#: Of Marlin's and of most published checkpoints: so many rows of a weight have a scale in common.
GROUP = 128
#: How many weights of four bits an int32 has.
PACKED = 8
#: Such scales make weights as large as those of the checkpoint that the quantised one is made of.
SCALE = 0.005
#: Seconds for a part that may compile.
LIMIT = 900.0


def _builder() -> tuple[Any, Any]:
    """A Llama whose heads flashinfer's kernels support, and whose projections Marlin's do."""
    from sglang_distguard.testing.models import DECODER
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512}
    return LlamaForCausalLM, LlamaConfig(**{**DECODER, **sizes})


def _wide(models: Path, seed: int) -> Path:
    """Return the folder of a Llama with heads of 64 numbers; write it unless it is there."""
    from sglang_distguard.testing import create_model

    return create_model("llama", models / "wide", seed=seed, builders={"llama": _builder})


def _quantised(kind: str, models: Path, seed: int) -> Path:
    """Return the folder of such a Llama with random projections of four bits, in this format."""
    write = partial(_write, kind)
    return made_of_llama(models, kind, seed, write, base=_wide(models, seed))


def _write(kind: str, base: Path, weights: dict[str, Any], generator: Any, target: Path) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            columns, rows = weight.shape
            stem = name.removesuffix("weight")
            made = _FORMATS[kind](rows, columns, generator)
            tensors.update({f"{stem}{part}": it for part, it in made.items()})
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": kind,
        "bits": 4,
        "group_size": GROUP,
        **_CONFIGS[kind],
    }
    (target / "config.json").write_text(json.dumps(config))
    if (base / "generation_config.json").exists():
        shutil.copy(base / "generation_config.json", target)


def _bits(rows: int, columns: int, generator: Any) -> Any:
    """Random bits as int32."""
    import torch

    least = torch.iinfo(torch.int32).min
    return torch.randint(least, -least, (rows, columns), generator=generator).to(torch.int32)


def _scales(rows: int, columns: int, generator: Any) -> Any:
    import torch

    random = torch.rand(rows // GROUP, columns, generator=generator)
    return (SCALE * (0.5 + random)).to(torch.float16)


def _awq(rows: int, columns: int, generator: Any) -> Mapping[str, Any]:
    return {
        "qweight": _bits(rows, columns // PACKED, generator),
        "qzeros": _bits(rows // GROUP, columns // PACKED, generator),
        "scales": _scales(rows, columns, generator),
    }


def _gptq(rows: int, columns: int, generator: Any) -> Mapping[str, Any]:
    import torch

    return {
        "qweight": _bits(rows // PACKED, columns, generator),
        # A symmetric format: 7 in each place, for zero points are written without one (GPTQ, v1).
        "qzeros": torch.full((rows // GROUP, columns // PACKED), 0x77777777, dtype=torch.int32),
        "scales": _scales(rows, columns, generator),
        "g_idx": (torch.arange(rows) // GROUP).to(torch.int32),
    }


_FORMATS = {"awq": _awq, "gptq": _gptq}
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "awq": {"zero_point": True, "version": "gemm"},
    "gptq": {"desc_act": False, "sym": True, "lm_head": False},
}


def _methods(runner: Any) -> set[str]:
    """The names of the schemes by which a runner's projections compute."""
    schemes = [getattr(it, "scheme", None) for it in runner.model.modules()]
    return {type(it).__name__ for it in schemes if it is not None}


def _by(scheme: str, runner: Any, activate: Activate) -> Any:
    """As ``generated``; raise an error unless the projections compute by this scheme of SGLang."""
    if _methods(runner) != {scheme}:
        raise RuntimeError(f"projections compute by {_methods(runner)}, not by {scheme}")
    return generated(runner, activate)


def _with_flashinfer(runner: Any, activate: Activate) -> Any:
    """As ``generated``; raise an error unless attention is flashinfer's."""
    kind = type(runner.attn_backend).__name__
    if kind != "FlashInferAttnBackend":
        raise RuntimeError(f"attention is of {kind}")
    return generated(runner, activate)


def _graphs() -> Mapping[str, Any]:
    from sglang_distguard.testing import graphs

    return {**graphs.CUDA_GRAPHS, "disable_prefill_cuda_graph": True}


def sections() -> list[Section]:
    """All sections whose kernels are compiled on the machine."""
    card: dict[str, Any] = {"folder": _wide, "needs_cuda": True, "limit": LIMIT}
    kernels: dict[str, Any] = {"prepare": leave_out_dual_gemm, "note": KERNELS, **card}
    flashinfer = {"attention_backend": "flashinfer"}

    def with_graphs(models: Path, seed: int) -> Mapping[str, Any]:
        return {**flashinfer, **_graphs()}

    def quantised(name: str, kind: str, scheme: str, **settings: Any) -> Section:
        return section(
            name,
            "llama",
            partial(_by, scheme),
            on_card(settings),
            folder=partial(_quantised, kind),
            needs_cuda=True,
            note=NATIVE,
            limit=LIMIT,
        )

    half = {"dtype": "float16"}  # the only one that SGLang's awq supports (0.5.23)
    return [
        section("kernels", "llama", **kernels),
        section("flashinfer", "llama", _with_flashinfer, on_card(flashinfer), **kernels),
        section("flashinfer_graphs", "llama", _with_flashinfer, with_graphs, **kernels),
        quantised("awq", "awq", "AWQLinearScheme", quantization="awq", **half),
        quantised("awq_marlin", "awq", "AWQMarlinLinearScheme"),
        quantised("gptq_marlin", "gptq", "GPTQMarlinLinearScheme"),
    ]


def audited(models: Path) -> list[tuple[str, Path, Mapping[str, Any]]]:
    """What ``gpu_audit.py`` runs of these: a name, a checkpoint, and settings."""
    half = {"dtype": "bfloat16"}
    return [
        ("llama by flashinfer", _wide(models, 0), {**half, "attention_backend": "flashinfer"}),
        ("llama in awq", _quantised("awq", models, 0), half),
        ("llama in gptq", _quantised("gptq", models, 0), half),
    ]
