"""Rows of the catalog: decoders with attention only, dense and MoE, SGLang's and transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_distguard.testing.catalog.families import (
    ALL_HEADS,
    DENSE,
    GEMMA2,
    GPT,
    HEADS,
    LOCAL_EXPERTS,
    MIXED,
    MLA,
    MOE,
    ONE_HEAD,
    WINDOW,
    Row,
)
from sglang_distguard.testing.models import VOCABULARY


def dense() -> list[Row]:
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        ("apertus", "ApertusForCausalLM", DENSE),
        ("arcee", "ArceeForCausalLM", HEADS),
        ("cohere", "CohereForCausalLM", DENSE),
        ("cohere2", "Cohere2ForCausalLM", {**HEADS, **WINDOW, "layer_types": MIXED}),
        (
            "exaone4",
            "Exaone4ForCausalLM",
            {**DENSE, "sliding_window": None, "layer_types": ["full_attention"] * 2},
        ),
        ("gemma", "GemmaForCausalLM", HEADS),
        ("gemma2", "Gemma2ForCausalLM", GEMMA2),
        (
            "gemma3",
            "Gemma3ForCausalLM",
            {**HEADS, **WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 16},
        ),
        (
            "gemma3n",
            "Gemma3nForCausalLM",
            {
                **HEADS,
                **WINDOW,
                "layer_types": MIXED,
                "num_kv_shared_layers": 0,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 16,
                "laurel_rank": 8,
                "intermediate_size": [128, 128],
                "activation_sparsity_pattern": [0.5, 0.0],
            },
        ),
        (
            "gemma4",
            "Gemma4ForCausalLM",
            {
                **HEADS,
                **WINDOW,
                "layer_types": MIXED,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 16,
                "per_layer_config": {},
            },
        ),
        ("glm4", "Glm4ForCausalLM", HEADS),
        ("gpt_bigcode", "GPTBigCodeForCausalLM", GPT),
        ("gptj", "GPTJForCausalLM", {**GPT, "rotary_dim": 8}),
        (
            "granite",
            "GraniteForCausalLM",
            {
                **DENSE,
                "embedding_multiplier": 12.0,
                "logits_scaling": 8.0,
                "residual_multiplier": 0.22,
                "attention_multiplier": 0.1,
            },
        ),
        (
            "granite_swa",
            "GraniteSWAForCausalLM",
            {**DENSE, **WINDOW, "layer_types": MIXED[::-1]},
        ),
        (
            "hrm_text",
            "HrmTextForCausalLM",
            {**HEADS, "num_layers_per_stack": 1, "num_key_value_heads": 4},
        ),
        ("hunyuan_dense", "HunYuanDenseV1ForCausalLM", {**ONE_HEAD, "use_qk_norm": True}),
        ("minicpm3", "MiniCPM3ForCausalLM", {**MLA, "dim_model_base": 32}),
        ("ministral3", "Ministral3ForCausalLM", HEADS),
        ("mistral", "MistralForCausalLM", {**HEADS, "sliding_window": None}),
        ("olmo", "OlmoForCausalLM", {**ALL_HEADS, "clip_qkv": 1.0}),
        ("olmo2", "Olmo2ForCausalLM", DENSE),
        ("persimmon", "PersimmonForCausalLM", ALL_HEADS),
        ("phi", "PhiForCausalLM", {**ALL_HEADS, "intermediate_size": 256}),
        ("phi3", "Phi3ForCausalLM", {**DENSE, "original_max_position_embeddings": 256}),
        ("qwen2", "Qwen2ForCausalLM", DENSE),
        ("qwen3", "Qwen3ForCausalLM", HEADS),
        ("stablelm", "StableLmForCausalLM", {**DENSE, "use_qkv_bias": True}),
        ("starcoder2", "Starcoder2ForCausalLM", {**DENSE, "sliding_window": None}),
    ]
    served: list[tuple[str, str, Mapping[str, Any], str]] = [
        ("ernie4_5", "Ernie4_5ForCausalLM", HEADS, "Ernie4_5_ForCausalLM"),
        ("internlm3", "LlamaForCausalLM", DENSE, "InternLM3ForCausalLM"),
        ("iquest_coder", "LlamaForCausalLM", DENSE, "IQuestCoderForCausalLM"),
        ("mimo", "Qwen2ForCausalLM", DENSE, "MiMoForCausalLM"),
        ("torch_native_llama", "LlamaForCausalLM", DENSE, "TorchNativeLlamaForCausalLM"),
        ("xverse", "LlamaForCausalLM", ALL_HEADS, "XverseForCausalLM"),
    ]
    return [
        *(Row(name, "dense", cls, settings) for name, cls, settings in rows),
        *(Row(name, "dense", cls, settings, as_) for name, cls, settings, as_ in served),
    ]


def moe() -> list[Row]:
    glm = {**MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    shared = {"shared_expert_intermediate_size": 64}
    sparse = {"mlp_layer_types": ["dense", "sparse"]}
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        (
            "afmoe",
            "AfmoeForCausalLM",
            {**MOE, **WINDOW, "layer_types": MIXED, "num_shared_experts": 1},
        ),
        ("cohere2_moe", "Cohere2MoeForCausalLM", {**MOE, **WINDOW, "layer_types": MIXED}),
        (
            "dbrx",
            "DbrxForCausalLM",
            {
                "d_model": 64,
                "n_heads": 4,
                "n_layers": 2,
                "max_seq_len": 256,
                "vocab_size": VOCABULARY,
                "initializer_range": 0.1,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            },
        ),
        (
            "ernie4_5_moe",
            "Ernie4_5_MoeForCausalLM",
            {
                **DENSE,
                "moe_intermediate_size": 64,
                "moe_k": 2,
                "moe_num_experts": 8,
                "moe_num_shared_experts": 1,
                "moe_layer_end_index": 1,
            },
        ),
        (
            "exaone_moe",
            "ExaoneMoeForCausalLM",
            {**MOE, **WINDOW, **sparse, "layer_types": MIXED, "first_k_dense_replace": 1},
        ),
        (
            "gpt_oss",
            "GptOssForCausalLM",
            {**HEADS, **WINDOW, "num_local_experts": 8, "num_experts_per_tok": 2},
        ),
        ("granitemoe", "GraniteMoeForCausalLM", LOCAL_EXPERTS),
        (
            "granitemoe_shared",
            "GraniteMoeSharedForCausalLM",
            {**LOCAL_EXPERTS, "shared_intermediate_size": 64},
        ),
        (
            "granitemoe_swa",
            "GraniteMoeSWAForCausalLM",
            {**LOCAL_EXPERTS, **WINDOW, "layer_types": MIXED[::-1]},
        ),
        (
            "hunyuan_moe",
            "HunYuanMoEV1ForCausalLM",
            {
                **ONE_HEAD,
                "num_experts": 4,
                "moe_topk": 2,
                "moe_intermediate_size": 128,
                "num_shared_expert": 1,
                "use_mixed_mlp_moe": True,
                "use_qk_norm": True,
            },
        ),
        (
            "hy_v3",
            "HYV3ForCausalLM",
            {
                **MOE,
                **sparse,
                "num_shared_experts": 1,
                "route_norm": True,
                "first_k_dense_replace": 1,
                "use_qk_norm": True,
            },
        ),
        (
            "laguna",
            "LagunaForCausalLM",
            {**MOE, **WINDOW, **shared, **sparse, "layer_types": MIXED[::-1]},
        ),
        (
            "llama4",
            "Llama4ForCausalLM",
            {
                **HEADS,
                "intermediate_size_mlp": 128,
                "num_local_experts": 4,
                "use_qk_norm": False,  # as in Maverick; with it, SGLang computes only in bfloat16
            },
        ),
        (
            "mellum",
            "MellumForCausalLM",
            {
                **{key: value for key, value in MOE.items() if key != "num_experts"},
                **WINDOW,
                "num_local_experts": 8,
                "layer_types": MIXED,
            },
        ),
        (
            "mimo_v2_flash",
            "MiMoV2FlashForCausalLM",
            {
                **MOE,
                **WINDOW,
                **sparse,
                "n_routed_experts": 8,
                "v_head_dim": 16,
                "layer_types": MIXED[::-1],
                "hybrid_layer_pattern": [0, 1],
                "moe_layer_freq": [0, 1],
                "layernorm_epsilon": 1e-5,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "sliding_window_size": 16,
                "swa_head_dim": 16,
                "swa_v_head_dim": 16,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_rope_theta": 10000.0,
            },
        ),
        ("olmoe", "OlmoeForCausalLM", {**ALL_HEADS, "num_experts": 8, "num_experts_per_tok": 2}),
        (
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            {**{k: v for k, v in MOE.items() if k != "head_dim"}, **shared},
        ),
    ]
    return [
        *(Row(name, "MoE", cls, settings) for name, cls, settings in rows),
        Row(
            "glm4_moe",
            "MoE",
            "Glm4MoeForCausalLM",
            {**glm, "use_qk_norm": True},
            beside={"enable_tf32_matmul": True},
        ),
        Row(
            "minimax_m2",
            "MoE",
            "MiniMaxM2ForCausalLM",
            {**LOCAL_EXPERTS, "head_dim": 16, "scoring_func": "sigmoid", "num_mtp_modules": 0},
            beside={"enable_tf32_matmul": True},
        ),
        Row("phimoe", "MoE", "PhimoeForCausalLM", LOCAL_EXPERTS, "PhiMoEForCausalLM"),
    ]


def fallback() -> list[Row]:
    """Architectures that SGLang has no class for and runs through transformers' own modules."""
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        ("cwm", "CwmForCausalLM", {**HEADS, **WINDOW, "layer_types": MIXED}),
        ("diffllama", "DiffLlamaForCausalLM", HEADS),
        ("glm", "GlmForCausalLM", HEADS),
        ("gpt_neox", "GPTNeoXForCausalLM", ALL_HEADS),
        ("helium", "HeliumForCausalLM", HEADS),
        ("nanochat", "NanoChatForCausalLM", ONE_HEAD),
        ("nemotron", "NemotronForCausalLM", HEADS),
        ("olmo3", "Olmo3ForCausalLM", {**DENSE, **WINDOW, "layer_types": MIXED}),
        ("seed_oss", "SeedOssForCausalLM", HEADS),
        ("smollm3", "SmolLM3ForCausalLM", DENSE),
    ]
    moe: list[tuple[str, str, Mapping[str, Any]]] = [
        (
            "dots1",
            "Dots1ForCausalLM",
            {**MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
        ),
        (
            "flex_olmo",
            "FlexOlmoForCausalLM",
            {**DENSE, "num_experts": 8, "num_experts_per_tok": 2},
        ),
    ]
    return [
        *(
            Row(name, "dense", cls, settings, "TransformersForCausalLM", fallback=True)
            for name, cls, settings in rows
        ),
        *(
            Row(name, "MoE", cls, settings, "TransformersMoEForCausalLM", fallback=True)
            for name, cls, settings in moe
        ),
    ]
