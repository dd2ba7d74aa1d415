"""Rows of the catalog: latent attention, hybrids with a state, and models that do not generate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_distguard.testing.catalog.families import (
    DENSE,
    EMBEDDING,
    ENCODER,
    GEMMA2,
    HEADS,
    LINEAR,
    LOCAL_EXPERTS,
    MAMBA,
    MIXED,
    MLA,
    MOE,
    WINDOW,
    YARN,
    Row,
)
from sglang_distguard.testing.models import VOCABULARY


def _reward(base: Any) -> Any:
    """The head of Qwen's published reward models over transformers' classifier."""
    from torch import nn

    class RewardModel(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            width = config.hidden_size
            self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
            self.post_init()

    return RewardModel


def latent() -> list[Row]:
    lite = {**MLA, "mlp_layer_types": ["dense", "sparse"]}
    indexer = {"index_topk": 16, "index_head_dim": 32, "index_n_heads": 4}
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        (
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            {
                **MLA,
                **YARN,
                "topk_method": "group_limited_greedy",
                "scoring_func": "softmax",
                "head_dim": 16,
                "moe_layer_freq": 1,  # as in the real checkpoint; transformers has no field for it
            },
        ),
        (
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            {
                **MLA,
                **YARN,
                "moe_layer_freq": 1,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
            },
        ),
        ("deepseek_v32", "DeepseekV32ForCausalLM", {**lite, **indexer, **YARN}),
        ("glm4_moe_lite", "Glm4MoeLiteForCausalLM", {**lite, "n_group": 1}),
        ("glm_moe_dsa", "GlmMoeDsaForCausalLM", {**lite, **indexer, "n_group": 1}),
        (
            "longcat_flash",
            "LongcatFlashForCausalLM",
            {
                **{k: v for k, v in MLA.items() if k != "num_hidden_layers"},
                "num_layers": 1,
                "head_dim": 16,
                "ffn_hidden_size": 128,
                "expert_ffn_hidden_size": 64,
                "moe_topk": 2,
                "zero_expert_num": 4,
                "disable_quant_module": [],
            },
        ),
    ]
    return [Row(name, "MLA", cls, settings) for name, cls, settings in rows]


def hybrid() -> list[Row]:
    mixed = {"layer_types": ["conv", "full_attention"]}
    state = {"state_size": 16, "hidden_size": 64, "num_hidden_layers": 2}
    mamba = {**state, "vocab_size": VOCABULARY, "time_step_rank": 8}
    moe = {**LINEAR, **MOE, "shared_expert_intermediate_size": 64}
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        ("falcon_h1", "FalconH1ForCausalLM", {**HEADS, **MAMBA, "mamba_d_ssm": 128}),
        ("falcon_mamba", "FalconMambaForCausalLM", mamba),
        (
            "granitemoe_hybrid",
            "GraniteMoeHybridForCausalLM",
            {
                **LOCAL_EXPERTS,
                **MAMBA,
                "shared_intermediate_size": 64,
                "layer_types": ["linear_attention", "full_attention"],
            },
        ),
        (
            "kimi_linear",
            "KimiLinearForCausalLM",
            {
                **MLA,
                "q_lora_rank": None,
                "num_experts": 8,
                "num_experts_per_token": 2,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "first_k_dense_replace": 1,
            },
        ),
        ("lfm2", "Lfm2ForCausalLM", {**DENSE, **mixed}),
        ("lfm2_moe", "Lfm2MoeForCausalLM", {**MOE, **mixed, "num_dense_layers": 1}),
        ("mamba", "MambaForCausalLM", mamba),
        ("mamba2", "Mamba2ForCausalLM", {**mamba, "num_heads": 8, "head_dim": 16, "n_groups": 1}),
        (
            "nemotron_h",
            "NemotronHForCausalLM",
            {
                **{k: v for k, v in HEADS.items() if k != "num_hidden_layers"},
                "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
                "ssm_state_size": 16,
                "mamba_num_heads": 8,
                "mamba_head_dim": 16,
                "n_groups": 1,
                "chunk_size": 16,
                "moe_intermediate_size": 64,
                "moe_shared_expert_intermediate_size": 64,
            },
        ),
        ("qwen3_5", "Qwen3_5ForCausalLM", LINEAR),
        ("qwen3_5_moe", "Qwen3_5MoeForCausalLM", moe),
        ("qwen3_next", "Qwen3NextForCausalLM", {**moe, "full_attention_interval": 2}),
        (
            "zaya",
            "ZayaForCausalLM",
            {**MOE, "num_experts_per_tok": 1, "router_hidden_size": 16},
        ),
    ]
    return [Row(name, "hybrid", cls, settings) for name, cls, settings in rows]


def pooled() -> list[Row]:
    labels = {"num_labels": 3}
    last, first = "last token", "first token"
    gemma = {**HEADS, **WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 16}
    embedding = [
        Row("bert", "encoder", "BertModel", ENCODER, readout=first, overrides=EMBEDDING),
        Row(
            "contriever",
            "encoder",
            "BertModel",
            ENCODER,
            "Contriever",
            readout=first,
            overrides=EMBEDDING,
        ),
        Row(
            "xlm_roberta",
            "encoder",
            "XLMRobertaModel",
            ENCODER,
            readout=first,
            overrides=EMBEDDING,
        ),
        Row(
            "embedding_gemma",
            "encoder",
            "Gemma3TextModel",
            {**gemma, "use_bidirectional_attention": True},
            "EmbeddingGemmaModel",
            readout="mean",
            overrides=EMBEDDING,
            fallback=True,
        ),
        Row(
            "llama_embedding",
            "embedding",
            "LlamaModel",
            DENSE,
            "LlamaEmbeddingModel",
            readout=last,
        ),
        Row(
            "mistral_embedding",
            "embedding",
            "MistralModel",
            {**HEADS, "sliding_window": None},
            readout=last,
        ),
        Row("qwen3_embedding", "embedding", "Qwen3Model", HEADS, readout=last),
    ]
    scores: list[tuple[str, str, str, Mapping[str, Any]]] = [
        ("bert_scores", "encoder", "BertForSequenceClassification", ENCODER),
        ("xlm_roberta_scores", "encoder", "XLMRobertaForSequenceClassification", ENCODER),
        (
            "gemma2_scores",
            "scores",
            "Gemma2ForSequenceClassification",
            GEMMA2,
        ),
        ("llama_scores", "scores", "LlamaForSequenceClassification", DENSE),
        ("qwen2_scores", "scores", "Qwen2ForSequenceClassification", DENSE),
        ("qwen3_scores", "scores", "Qwen3ForSequenceClassification", HEADS),
    ]
    rewards = [
        Row(
            f"{name}_reward",
            "reward",
            f"{cls}ForSequenceClassification",
            {**settings, "num_labels": 1},
            f"{cls}ForRewardModel",
            readout="scores",
            change=_reward,
        )
        for name, cls, settings in (("qwen2", "Qwen2", DENSE), ("qwen3", "Qwen3", HEADS))
    ]
    return [
        *embedding,
        *(
            Row(name, kind, cls, {**settings, **labels}, readout="scores")
            for name, kind, cls, settings in scores
        ),
        *rewards,
    ]
