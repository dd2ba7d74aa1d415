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
can be of another make. Of models with latent attention (MLA) MiniCPM3 runs here: for the others SGLang picks a prefill that
torch_native cannot do. Of models with a state (hybrid) none does: of the thirteen, six want kernels or a driver that this
CPU has not, four have no class in SGLang, and three fail on the files that transformers writes.
"""

_WINDOW = (
    "SGLang's window is a token wider: Hugging Face with sliding_window 17 for 16 is within 6e-7."
)
_SCORES = (
    "The layer that gives scores has a bias in SGLang, which no checkpoint has: it stays random."
)
_ONE_HEAD = "Of one head: SGLang gives attention one row for each head, and torch_native cuts those it takes for padding."
_PREFILL = (
    "torch_native has no handler in SGLang's AttentionBackendRegistry and gets Triton's, which picks a prefill that "
    "reads other keys than torch_native keeps."
)

NOTES: dict[str, str] = {
    "cohere2": _WINDOW,
    "cohere2_moe": _WINDOW,
    "cwm": _WINDOW,
    "gptj": "SGLang has no bias in lm_head: Hugging Face without it is within 5e-7.",
    "apertus": "SGLang keeps xIELU's own parameters in bfloat16 and computes their softplus there: Hugging Face "
    "with act_fn in bfloat16 is within 8e-7.",
    "olmo3": "SGLang does not look for theta in rope_parameters per kind of layer and takes 10000 for 500000: "
    "Hugging Face with 10000 is within 7e-7.",
    "embedding_gemma": "torch_native attends causally where the model attends both ways: Hugging Face made "
    "causal is within 3e-8.",
    "phi": "SGLang does not add lm_head's bias: Hugging Face without it is within 6e-7.",
    "torch_native_llama": "SGLang loads none of the weights: its load_weights looks at the root module's own "
    "parameters only.",
    "minimax_m2": "The config has no use_qk_norm, so SGLang leaves out the norms of q and k: Hugging Face "
    "without them is within 7e-7. With it SGLang wants CUDA.",
    "hunyuan_dense": _ONE_HEAD,
    "hunyuan_moe": _ONE_HEAD,
    "nanochat": "Of one head: SGLang's RMSNorm insists on hidden_size where the model norms a head.",
    "deepseek_v2": _PREFILL,
    "deepseek_v3": _PREFILL,
    "glm4_moe_lite": _PREFILL,
    "qwen2_scores": _SCORES,
    "qwen3_scores": _SCORES,
}
