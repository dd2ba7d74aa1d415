"""The head of docs/ARCHITECTURES.md, and notes on architectures that are not simply right."""

from __future__ import annotations

HEAD = """# Architectures

Every architecture of SGLang 0.5.23 for which transformers has weights and a small random checkpoint
can be made, on one CPU rank, `attention_backend="torch_native"`, float32. `make architectures` runs
them all (an hour on two cores) and writes this file. {versions}.

For each architecture:

- Two checkpoints with different weights are made (biases and norms are random too). Hugging Face's
  own model computes with them in float32.
- Plain SGLang runs alone, each checkpoint in its own process, and again with different
  uninitialised memory and another random seed. It computes the logits of a prefill and three decode
  steps on Hugging Face's tokens, or the vectors of one prefill (encoders, embedding and reward
  models).
- Each prompt of a vision or audio model has an image or a sound of its own, which is noise; both
  checkpoints get the same ones. SGLang keeps what an encoder makes of them, so that the second and
  third run of a runner use what it kept.
- With the guard, both checkpoints and a Llama are built from three threads and run three times at
  once.
- Two runners with the guard run under the audit.

"Error alone" is the largest difference to Hugging Face, relative to the largest value. The
checkpoints are small ones that transformers writes. Where SGLang cannot run one, it may still run
the real checkpoint, whose files can have another form. Of the models with latent attention (MLA),
MiniCPM3 runs here; for the others SGLang chooses a prefill that torch_native does not support. None
of the thirteen models with a state (hybrid) runs. Six need kernels or a driver that this CPU does
not have, four have no class in SGLang, and three fail on the files that transformers writes.
"""

_WINDOW = (
    "SGLang's window is one token wider: Hugging Face with sliding_window 17, not 16, is within "
    "6e-7."
)
_SCORES = "SGLang's score layer has a bias, which no checkpoint has, so that it stays random."
_ONE_HEAD = (
    "With one head: SGLang gives attention one row for each head, and torch_native cuts the rows "
    "that it takes for padding."
)
_PREFILL = (
    "torch_native has no handler in SGLang's AttentionBackendRegistry and gets Triton's, which "
    "chooses a prefill that reads other keys than torch_native stores."
)

NOTES: dict[str, str] = {
    "cohere2": _WINDOW,
    "cohere2_moe": _WINDOW,
    "cwm": _WINDOW,
    "gptj": "SGLang has no bias in lm_head: Hugging Face without it is within 5e-7.",
    "apertus": "SGLang keeps xIELU's own parameters in bfloat16 and computes their softplus in it: "
    "Hugging Face with act_fn in bfloat16 is within 8e-7.",
    "olmo3": "SGLang does not look for theta in rope_parameters per kind of layer and takes 10000, "
    "not 500000: Hugging Face with 10000 is within 7e-7.",
    "embedding_gemma": "torch_native attends causally where the model attends in both directions: "
    "Hugging Face made causal is within 3e-8.",
    "phi": "SGLang does not add lm_head's bias: Hugging Face without it is within 6e-7.",
    "torch_native_llama": "SGLang loads none of the weights: its load_weights reads only the root "
    "module's own parameters.",
    "minimax_m2": "The config has no use_qk_norm, so SGLang leaves out the norms of q and k: "
    "Hugging Face without them is within 7e-7. With it SGLang needs CUDA.",
    "hunyuan_dense": _ONE_HEAD,
    "hunyuan_moe": _ONE_HEAD,
    "nanochat": "With one head: SGLang's RMSNorm requires hidden_size where the model norms heads.",
    "deepseek_v2": _PREFILL,
    "deepseek_v3": _PREFILL,
    "glm4_moe_lite": _PREFILL,
    "gemma3_vision": "torch_native attends causally within an image, and SGLang's SigLIP has "
    "QuickGELU: Hugging Face made causal and with quick_gelu is within 5e-7.",
    "qwen2_scores": _SCORES,
    "qwen3_scores": _SCORES,
}
