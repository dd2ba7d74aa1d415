"""The parts of the catalog's rows: settings by family, and the row class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from sglang_distguard.testing.catalog.items import Maker
from sglang_distguard.testing.models import DECODER, VOCABULARY

#: Ids within the vocabulary, none of which is in ``PROMPTS``.
TOKENS: Mapping[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Settings are named as in the family's own configuration. Weights are larger than transformers'
#: default, so that attention and routing are far from uniform and errors show.
DENSE: Mapping[str, Any] = {**DECODER, "initializer_range": 0.1}
ALL_HEADS: Mapping[str, Any] = {**DENSE, "num_key_value_heads": 4}
HEADS: Mapping[str, Any] = {**DENSE, "head_dim": 16}
ONE_HEAD: Mapping[str, Any] = {
    **HEADS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
#: Both prompts are longer than this window.
WINDOW: Mapping[str, Any] = {"sliding_window": 16}
MIXED = ["sliding_attention", "full_attention"]
MOE: Mapping[str, Any] = {
    **HEADS,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
LOCAL_EXPERTS: Mapping[str, Any] = {**DENSE, "num_local_experts": 8, "num_experts_per_tok": 2}
MLA: Mapping[str, Any] = {
    **DENSE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
LINEAR: Mapping[str, Any] = {
    **HEADS,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA: Mapping[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
ENCODER: Mapping[str, Any] = {
    **{key: value for key, value in DENSE.items() if key != "num_key_value_heads"},
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
}
GPT: Mapping[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_positions": 256,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
}
EMBEDDING: Mapping[str, Any] = {"is_embedding": True}
GEMMA2: Mapping[str, Any] = {
    **HEADS,
    **WINDOW,
    "query_pre_attn_scalar": 16,
    "hidden_act": "gelu_pytorch_tanh",
}
#: As DeepSeek publishes it; SGLang on a CPU supports no other.
YARN: Mapping[str, Any] = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }
}


@dataclass(frozen=True)
class Row:
    """One architecture; see ``catalog.Entry``.

    Attributes:
        change: derives the class to build from transformers' own.
        fallback: SGLang has no class of its own and runs transformers' modules instead.
    """

    name: str
    kind: str
    transformers: str
    settings: Mapping[str, Any]
    served: Optional[str] = None
    readout: str = "logits"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    change: Optional[Callable[[Any], Any]] = None
    fallback: bool = False
    items: Optional[Maker] = None
