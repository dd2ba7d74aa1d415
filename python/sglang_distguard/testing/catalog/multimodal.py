"""Rows of the catalog: vision-language and audio models, with the items of their prompts.

The items have the shapes that the models' processors give for small pictures and short sounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_distguard.testing.catalog.families import DENSE, HEADS, MIXED, TOKENS, WINDOW, Row
from sglang_distguard.testing.catalog.items import (
    END,
    PLACEHOLDER,
    START,
    VIDEO,
    Maker,
    Prompt,
    inputs,
    noise,
    placed,
)

if TYPE_CHECKING:
    import torch

_PATCH = 4
#: Width and height of a square picture, and its number of patches.
_SIDE, _PATCHES = 16, 16
_MELS, _FRAMES = 16, 40
#: Frames of a sound after the encoder's convolution, which has a stride of two.
_HEARD = _FRAMES // 2
_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}


def rows() -> list[Row]:
    """The models with a text decoder and an encoder of images or sounds."""
    return [*_vision(), *_audio()]


def _vision() -> list[Row]:
    kind = "vision"
    qwen_ids = {
        "image_token_id": PLACEHOLDER,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    qwen_text = {**DENSE, **TOKENS, "rope_parameters": rope}
    qwen = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_chans": 3,  # as in the published checkpoints; transformers calls it in_channels
    }
    gemma = {
        "text_config": {
            **HEADS,
            **WINDOW,
            **TOKENS,
            "layer_types": MIXED,
            "query_pre_attn_scalar": 16,
        },
        "vision_config": {**_VISION, "vision_use_head": False},  # as in the published checkpoints
        "mm_tokens_per_image": 4,
        "image_token_index": PLACEHOLDER,
        "boi_token_index": START,
        "eoi_token_index": END,
    }
    clip = {
        "text_config": {**DENSE, **TOKENS, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": PLACEHOLDER,
    }
    pixtral = {
        "text_config": {**HEADS, **TOKENS, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": PLACEHOLDER,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    qwen2 = {**qwen, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    qwen2_5 = {
        **qwen,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return [
        Row(
            "qwen2_vl",
            kind,
            "Qwen2VLForConditionalGeneration",
            {"text_config": qwen_text, "vision_config": qwen2, **qwen_ids},
            items=_qwen_image("qwen2_vl"),
        ),
        Row(
            "qwen2_5_vl",
            kind,
            "Qwen2_5_VLForConditionalGeneration",
            {"text_config": qwen_text, "vision_config": qwen2_5, **qwen_ids},
            items=_qwen_image("qwen2_5_vl"),
        ),
        Row(
            "gemma3_vision",
            kind,
            "Gemma3ForConditionalGeneration",
            gemma,
            overrides={"enable_multimodal": True},  # SGLang 0.5.23 runs it as a text model else
            change=_saved_as("vision_tower.", "vision_tower.vision_model."),
            items=_picture(4, {}, token_type_ids=True),
        ),
        Row(
            "llava",
            kind,
            "LlavaForConditionalGeneration",
            clip,
            items=_picture(_PATCHES, {"image_sizes": [(_SIDE, _SIDE)]}),
        ),
        Row(
            "pixtral",
            kind,
            "LlavaForConditionalGeneration",
            pixtral,
            items=_picture(_PATCHES, {"image_sizes": [(_SIDE, _SIDE)]}, image_sizes=True),
        ),
    ]


def _audio() -> list[Row]:
    kind = "audio"
    encoder = {
        "num_mel_bins": _MELS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "d_model": 32,
        "max_source_positions": _HEARD,
    }
    decoder = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    whisper = {
        **encoder,
        **decoder,
        "vocab_size": DENSE["vocab_size"],
        "max_target_positions": 128,
        "decoder_start_token_id": TOKENS["bos_token_id"],
        "init_std": 0.2,
    }
    return [
        Row(
            "qwen2_audio",
            kind,
            "Qwen2AudioForConditionalGeneration",
            {
                "audio_config": encoder,
                "text_config": {**DENSE, **TOKENS, "model_type": "qwen2"},
                "audio_token_index": PLACEHOLDER,
            },
            change=_saved_as("language_model.model.model.", "language_model.model."),
            items=_sound,
        ),
        Row("whisper", kind, "WhisperForConditionalGeneration", whisper, items=_heard),
    ]


def _qwen_image(model_type: str) -> Maker:
    """A picture of 16 by 24 pixels: a grid of 4 by 6 patches, of which 2 by 2 make an embedding."""

    def make(ids: Sequence[int], number: int) -> Prompt:
        import torch

        grid = torch.tensor([[1, 4, 6]])
        pixels = noise(number, 4 * 6, 3 * 2 * _PATCH * _PATCH)
        whole = placed(ids, 6)

        def item() -> Any:
            # As `QwenVLImageProcessor` of SGLang 0.5.23.
            from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

            positions, delta = MRotaryEmbedding.get_rope_index(
                spatial_merge_size=2,
                image_token_id=PLACEHOLDER,
                video_token_id=VIDEO,
                vision_start_token_id=START,
                model_type=model_type,
                tokens_per_second=2,  # as in the published checkpoints of Qwen2.5-VL
                input_ids=torch.tensor([whole]),
                image_grid_thw=grid,
            )
            return inputs(
                "IMAGE",
                whole,
                pixels,
                {"image_grid_thw": grid},
                im_token_id=PLACEHOLDER,
                mrope_positions=positions.squeeze(1),
                mrope_position_delta=delta,
            )

        def reference(tokens: torch.Tensor) -> Mapping[str, Any]:
            return {
                "input_ids": tokens,
                "pixel_values": pixels,
                "image_grid_thw": grid,
                "mm_token_type_ids": (tokens == PLACEHOLDER).long(),
            }

        return Prompt(whole, reference, item)

    return make


def _picture(
    count: int,
    data: Mapping[str, Any],
    *,
    token_type_ids: bool = False,
    image_sizes: bool = False,
) -> Maker:
    """A square picture of ``count`` embeddings; the flags say what Hugging Face's model takes."""

    def make(ids: Sequence[int], number: int) -> Prompt:
        import torch

        pixels = noise(number, 1, 3, _SIDE, _SIDE)
        whole = placed(ids, count)

        def item() -> Any:
            tokens = {"im_token_id": PLACEHOLDER, "im_start_id": START, "im_end_id": END}
            return inputs("IMAGE", whole, pixels, data, **tokens)

        def reference(tokens: torch.Tensor) -> Mapping[str, Any]:
            given = {"input_ids": tokens, "pixel_values": pixels}
            if token_type_ids:
                given["token_type_ids"] = (tokens == PLACEHOLDER).long()
            if image_sizes:
                given["image_sizes"] = torch.tensor([[_SIDE, _SIDE]])
            return given

        return Prompt(whole, reference, item)

    return make


def _sound(ids: Sequence[int], number: int) -> Prompt:
    """A sound whose embeddings stand within the prompt: half the encoder's frames."""
    import torch

    count = _HEARD // 2
    sound = noise(number, 1, _MELS, _FRAMES)
    whole = placed(ids, count)

    def item() -> Any:
        data = {"audio_feature_lens": torch.tensor([count])}
        return inputs("AUDIO", whole, sound, data, audio_token_id=PLACEHOLDER)

    def reference(tokens: torch.Tensor) -> Mapping[str, Any]:
        heard = torch.ones(1, _FRAMES, dtype=torch.long)
        return {"input_ids": tokens, "input_features": sound, "feature_attention_mask": heard}

    return Prompt(whole, reference, item)


def _heard(ids: Sequence[int], number: int) -> Prompt:
    """A sound to which the decoder attends; the prompt has the decoder's ids only."""
    sound = noise(number, 1, _MELS, _FRAMES)

    def reference(tokens: torch.Tensor) -> Mapping[str, Any]:
        return {"decoder_input_ids": tokens, "input_features": sound}

    return Prompt(tuple(ids), reference, lambda: inputs("AUDIO", ids, sound, {}))


def _saved_as(written: str, published: str) -> Callable[[Any], Any]:
    """Derive a model that saves its tensors under the names of the published checkpoints.

    transformers 5.19 writes other names, reads both, and SGLang 0.5.23 knows the published ones.
    """

    def derive(base: Any) -> Any:
        def save_pretrained(model: Any, directory: Path, **how: Any) -> None:
            from safetensors.torch import load_file, save_file

            base.save_pretrained(model, directory, **how)
            file = directory / "model.safetensors"
            tensors = {
                name.replace(written, published, 1): it for name, it in load_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})

        # transformers converts names for classes of its own modules only.
        own = {"__module__": base.__module__, "save_pretrained": save_pretrained}
        return type(base.__name__, (base,), own)

    return derive
