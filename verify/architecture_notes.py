"""The head of docs/ARCHITECTURES.md, and what was found out about architectures that are not simply right."""

from __future__ import annotations

HEAD = """# Architectures

Every architecture of SGLang 0.5.23 that transformers has weights for and that a small random checkpoint can be made of,
on one CPU rank, `attention_backend="torch_native"`, float32. `make architectures` runs them all (an hour on two cores)
and writes this file. {versions}.

Each: two checkpoints of different weights (biases and norms are random too); Hugging Face's own model in float32; plain
SGLang alone, each checkpoint in a process of its own, logits of a prefill and three decode steps on Hugging Face's tokens
(encoders, embedding and reward models: the vectors of one prefill), again with other leavings in memory and another random
seed; with the guard, both checkpoints and a Llama built from three threads and run three times at once; and two runners with the
guard under the audit. "Error alone" is the largest difference to Hugging Face, relative to the largest value.
The checkpoints are what transformers writes, small; what SGLang cannot run of them it may run of the real ones, whose files
can be of another make. Of models with latent attention (MLA) or a state (hybrid) none ran here: their kernels are CUDA's,
Triton's or AMX's.
"""

_WINDOW = (
    "SGLang's window is a token wider: Hugging Face with sliding_window 17 for 16 is within 6e-7."
)
_SCORES = (
    "The layer that gives scores has a bias in SGLang, which no checkpoint has: it stays random."
)

NOTES: dict[str, str] = {
    "cohere2": _WINDOW,
    "cohere2_moe": _WINDOW,
    "cwm": _WINDOW,
    "gptj": "SGLang has no bias in lm_head: Hugging Face without it is within 5e-7.",
    "apertus": "Reason not known; not the weights' rounding to bfloat16.",
    "olmo3": "Reason not known; not the width of the window.",
    "embedding_gemma": "Reason not known; not the width of the window.",
    "phi": "Reason not looked for.",
    "torch_native_llama": "NaN alone; reason not looked for.",
    "hy_v3": "NaN alone; reason not looked for.",
    "minimax_m2": "Reason not looked for.",
    "qwen2_scores": _SCORES,
    "qwen3_scores": _SCORES,
}
