"""Paths of SGLang that no CPU runs: an audit on a CPU reads only their text.

What they write has the verdict "not exercised". The ledger has a line for each path. Tried and read
with SGLang 0.5.23.
"""

from __future__ import annotations

#: In the place of a module in the ledger.
MODULE = "(paths)"
#: Path -> why a CPU does not run it, and whether a GPU did.
UNRUN: dict[str, str] = {
    "LoRA": "`lora/layers.py` asks for a CUDA driver, also for the backend `torch_native`; "
    "a case of the audit on a GPU",
    "fp8 weights": "`fp8.py` needs AMX or an accelerator; a case of the audit on a GPU",
    "fp8 weights per channel": "`w8a8_fp8` computes with Triton; not run",
    "fp8 key-value caches": "refused for attention on a CPU; not run",
    "int8 weights": "`w8a8_int8.py` needs AMX or an accelerator; not run",
    "recorder of experts": "it counts on CUDA; a case of the audit on a GPU",
    "EPLB": "it needs expert parallelism; not run",
    "deterministic inference": "refused for `torch_native`; a case of the audit on a GPU",
    "memory released and resumed": "torch_memory_saver is preloaded and needs CUDA; `make gpu` "
    "runs it, not audited",
    "torch.compile of the whole model": "`TorchNativeAttnBackend` lacks what the CPU's graph "
    "runner calls; not run",
    "draft decode and verification of EAGLE and STANDALONE": "they need an attention backend for "
    "drafts, which `torch_native` is not (`speculative/draft_utils.py:64`); the draft workers that "
    "run build, load and do a prefill",
    "NGRAM": "its first verification needs a real `sgl_kernel` "
    "(`kernels/ops/speculative/reconstruct_tree.py:50`); with the stub the positions stay undefined",
    "LLaVA with CLIP, Qwen2.5-VL": "ARCHITECTURES.md has the reason; not run",
    "hybrid and state models": "ARCHITECTURES.md has the reason for each; not run",
}


def markdown() -> str:
    """Return the table of docs/audit.md; a test compares the two."""
    lines = ["| path | why |", "|---|---|", *(f"| {path} | {why} |" for path, why in UNRUN.items())]
    return "\n".join(lines)
