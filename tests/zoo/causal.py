"""Decoders and their language models."""

from typing import Any

import keras
import numpy as np

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task

LAYERS = 2


def next_tokens(model: keras.Model, batch: Any) -> np.ndarray:
    """What a language model is trained to say at every place."""
    return np.roll(batch["token_ids"], -1, axis=1)


def language_model(name: str, base: Case, **known: Any) -> Case:
    """A case of a language model on a decoder."""
    return task(name, base, {"labels": next_tokens, **known})


SIZES = dict(
    vocabulary_size=50, num_layers=LAYERS, hidden_dim=24, intermediate_dim=20
)
HEADS = SIZES | dict(num_heads=4)
# Four heads of queries share two of keys and values.
GROUPED = SIZES | dict(num_query_heads=4, num_key_value_heads=2)
EXPERTS = GROUPED | dict(num_experts=5, top_k=2)

# Queries, keys, values and outputs; a feed-forward part of two layers, or of
# three with a gate.
PLAIN = dict(attention=4 * LAYERS, mlp=2 * LAYERS, embeddings=1)
GATED = dict(attention=4 * LAYERS, mlp=3 * LAYERS, embeddings=1)
# One layer holds the experts. Routers are in no group.
ROUTED = dict(attention=4 * LAYERS, mlp=LAYERS, embeddings=1)

BLOOM = backbone("BloomBackbone", HEADS, **PLAIN)
FALCON = backbone(
    "FalconBackbone", SIZES | dict(num_attention_heads=4), **PLAIN
)
GPT2 = backbone("GPT2Backbone", HEADS | dict(max_sequence_length=32), **PLAIN)
GPT_NEO_X = backbone(
    "GPTNeoXBackbone",
    HEADS | dict(hidden_dim=32, rotary_percentage=0.5, max_sequence_length=32),
    # One layer for queries, keys and values, and the outputs.
    attention=2 * LAYERS,
    mlp=2 * LAYERS,
    embeddings=1,
)
OPT = backbone("OPTBackbone", HEADS | dict(max_sequence_length=32), **PLAIN)

LLAMA = backbone("LlamaBackbone", GROUPED, **GATED)
LLAMA3 = backbone(
    "Llama3Backbone",
    GROUPED
    | dict(
        rope_position_scaling_factor=8.0,
        rope_frequency_adjustment_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=16,
    ),
    **GATED,
)
MISTRAL = backbone("MistralBackbone", GROUPED | dict(sliding_window=4), **GATED)
PHI3 = backbone("Phi3Backbone", GROUPED, **GATED)
QWEN = backbone(
    "QwenBackbone",
    GROUPED | dict(use_sliding_window_attention=True, sliding_window_size=4),
    **GATED,
)
QWEN3 = backbone(
    "Qwen3Backbone", GROUPED | dict(head_dim=8, sliding_window_size=4), **GATED
)
SMOL_LM3 = backbone(
    "SmolLM3Backbone",
    SIZES
    | dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False],
        layer_types=["full_attention"] * LAYERS,
        mlp_bias=True,
        layer_norm_epsilon=1e-6,
        max_position_embeddings=32,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    ),
    **GATED,
)
GEMMA = backbone(
    "GemmaBackbone",
    GROUPED
    | dict(
        head_dim=8,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=4,
    ),
    **GATED,
)
GEMMA3 = backbone(
    "Gemma3Backbone",
    GROUPED
    | dict(
        num_layers=6,  # Of six blocks one attends globally.
        head_dim=8,
        image_size=None,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=4,
    ),
    attention=4 * 6,
    mlp=3 * 6,
    embeddings=1,
)

MIXTRAL = backbone("MixtralBackbone", EXPERTS, **ROUTED)
GPT_OSS = backbone("GptOssBackbone", EXPERTS | dict(sliding_window=4), **ROUTED)
QWEN_MOE = backbone(
    "QwenMoeBackbone",
    EXPERTS
    | dict(
        moe_intermediate_dim=10,
        shared_expert_intermediate_dim=14,
        mlp_only_layers=[0],
    ),
    attention=4 * LAYERS,
    # A feed-forward part with a gate; then the experts, beside one that every
    # token takes.
    mlp=3 + (1 + 3),
    embeddings=1,
)
QWEN3_MOE = backbone(
    "Qwen3MoeBackbone",
    EXPERTS | dict(head_dim=8, moe_intermediate_dim=10, mlp_only_layers=[0]),
    attention=4 * LAYERS,
    mlp=3 + 1,
    embeddings=1,
)

CASES: tuple[Case, ...] = (
    BLOOM,
    language_model("BloomCausalLM", BLOOM),
    FALCON,
    language_model("FalconCausalLM", FALCON),
    GPT2,
    language_model("GPT2CausalLM", GPT2),
    GPT_NEO_X,
    language_model("GPTNeoXCausalLM", GPT_NEO_X),
    OPT,
    language_model("OPTCausalLM", OPT),
    LLAMA,
    language_model("LlamaCausalLM", LLAMA),
    LLAMA3,
    language_model("Llama3CausalLM", LLAMA3),
    MISTRAL,
    language_model("MistralCausalLM", MISTRAL),
    PHI3,
    language_model("Phi3CausalLM", PHI3),
    QWEN,
    language_model("QwenCausalLM", QWEN),
    QWEN3,
    language_model("Qwen3CausalLM", QWEN3),
    task("Qwen3TextEmbedder", QWEN3, {}),
    SMOL_LM3,
    language_model("SmolLM3CausalLM", SMOL_LM3),
    GEMMA,
    language_model("GemmaCausalLM", GEMMA),
    GEMMA3,
    language_model("Gemma3CausalLM", GEMMA3),
    MIXTRAL,
    language_model("MixtralCausalLM", MIXTRAL),
    GPT_OSS,
    language_model("GptOssCausalLM", GPT_OSS),
    QWEN_MOE,
    language_model("QwenMoeCausalLM", QWEN_MOE),
    QWEN3_MOE,
    language_model("Qwen3MoeCausalLM", QWEN3_MOE),
)
