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


def last_token_apart(batch: Any) -> dict[str, np.ndarray]:
    """A prompt, and its last token at the start of what is written."""
    tokens = np.maximum(batch["token_ids"], 1)  # Zeros are open places.
    first, rest = tokens[:, :6], tokens[:, 6:]
    rest = np.pad(rest[:, :1], [(0, 0), (0, rest.shape[1] - 1)])
    return {
        "token_ids": first,
        "input_padding_mask": np.ones_like(first),
        "predict_token_ids": rest,
        "padding_mask": rest > 0,
    }


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
    EXPERTS | dict(moe_intermediate_dim=10, shared_expert_intermediate_dim=14),
    attention=4 * LAYERS,
    # The experts, beside one that every token takes.
    mlp=(1 + 3) * LAYERS,
    embeddings=1,
)
QWEN3_MOE = backbone(
    "Qwen3MoeBackbone",
    EXPERTS | dict(head_dim=8, moe_intermediate_dim=10, mlp_only_layers=[0]),
    attention=4 * LAYERS,
    # A feed-forward part with a gate; then the experts.
    mlp=3 + 1,
    embeddings=1,
)

GEMMA3N = backbone(
    "Gemma3nBackbone",
    dict(
        text_vocab_size=50,
        text_hidden_size=24,
        num_hidden_layers=3,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=[20, 20, 20],
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"]
        + ["full_attention"],
        sliding_window=4,
        rope_theta=10000.0,
        max_position_embeddings=32,
        vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=6,
        altup_num_inputs=3,
        laurel_rank=5,
        activation_sparsity_pattern=[0.9, 0.0, 0.0],
        num_kv_shared_layers=1,
        final_logit_soft_cap=30.0,
    ),
    attention=4 * 3,
    # A feed-forward part with a gate, LAuReL's two, AltUp's three, and two
    # around the inputs of each layer.
    mlp=(3 + 2 + 3 + 2) * 3,
    # Into and out of the other two streams, and the inputs of all layers.
    linear=14 * 3 + 2 * 2 + 1,
    embeddings=2,
    idle={r"layers\.2\.attention\.[kv]_proj": "it takes over keys and values"},
)
GEMMA4 = backbone(
    "Gemma4Backbone",
    GROUPED
    | dict(
        num_layers=4,
        image_size=None,
        head_dim=8,
        global_head_dim=12,
        num_global_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window_size=4,
        global_rope_partial_rotary_factor=0.5,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=50,
        use_double_wide_mlp=True,
        enable_moe_block=True,
        num_experts=5,
        expert_intermediate_dim=10,
        num_experts_per_token=2,
        final_logit_soft_cap=30.0,
    ),
    # The global attention's keys are its values too; the last two blocks take
    # over keys and values.
    attention=4 + 3 + 2 + 2,
    # A feed-forward part with a gate, the experts beside it, and two around the
    # inputs of each layer.
    mlp=(3 + 1 + 2) * 4,
    linear=11 + 24 + 1,
    embeddings=2,
)

NO_TRACED_WINDOW = {
    "generate on tensorflow": "with a sliding window, Python asks whether a "
    "traced index is zero"
}
WRONG_RECURRENCE = {
    "generate": "the state takes in padding, and a prompt's last token twice"
}

ASSISTANT = backbone(
    "Gemma4Backbone",
    GROUPED
    | dict(
        image_size=None,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=LAYERS,
    ),
    # Keys and values are another model's.
    attention=2 * LAYERS,
    mlp=3 * LAYERS,
    embeddings=1,
)
NO_CALL = "it drafts for another model, and raises when it is called"

# Of two blocks, one has linear attention.
HYBRID = dict(
    vocabulary_size=50,
    num_layers=LAYERS,
    num_query_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    hidden_dim=24,
    layer_types=["linear_attention", "full_attention"],
    partial_rotary_factor=0.5,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=6,
    linear_value_head_dim=10,
    linear_conv_kernel_dim=3,
)
# Queries, keys and values at once, a gate, two of the recurrence, and outputs.
HYBRID_ATTENTION = 5 + 4
QWEN3_5 = backbone(
    "Qwen3_5Backbone",
    HYBRID | dict(intermediate_dim=20),
    attention=HYBRID_ATTENTION,
    mlp=3 * LAYERS,
    embeddings=1,
)
QWEN3_5_MOE = backbone(
    "Qwen3_5MoeBackbone",
    HYBRID
    | dict(
        moe_intermediate_dim=10,
        shared_expert_intermediate_size=14,
        num_experts=5,
        top_k=2,
    ),
    attention=HYBRID_ATTENTION,
    # The experts, beside one that every token takes.
    mlp=(1 + 3) * LAYERS,
    embeddings=1,
)

RWKV7 = backbone(
    "RWKV7Backbone",
    dict(
        hidden_size=24,
        head_size=6,
        num_layers=LAYERS,
        vocabulary_size=50,
        intermediate_dim=20,
        gate_lora=7,
        mv_lora=5,
        aaa_lora=4,
        decay_lora=3,
    ),
    # Four layers in place of an attention's, and one that holds narrow
    # networks as weights of its own.
    attention=5 * LAYERS,
    mlp=2 * LAYERS,
    # The backbone ends in logits.
    linear=7 * LAYERS + 1,
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
    language_model("QwenCausalLM", QWEN, unable=NO_TRACED_WINDOW),
    QWEN3,
    language_model("Qwen3CausalLM", QWEN3),
    task("Qwen3TextEmbedder", QWEN3, {}),
    SMOL_LM3,
    language_model("SmolLM3CausalLM", SMOL_LM3),
    GEMMA,
    language_model("GemmaCausalLM", GEMMA),
    GEMMA3,
    language_model("Gemma3CausalLM", GEMMA3),
    task("Gemma3TextEmbedder", GEMMA3, {}),
    MIXTRAL,
    language_model("MixtralCausalLM", MIXTRAL),
    GPT_OSS,
    language_model("GptOssCausalLM", GPT_OSS),
    QWEN_MOE,
    language_model("QwenMoeCausalLM", QWEN_MOE, unable=NO_TRACED_WINDOW),
    QWEN3_MOE,
    language_model("Qwen3MoeCausalLM", QWEN3_MOE),
    GEMMA3N,
    language_model("Gemma3nCausalLM", GEMMA3N),
    GEMMA4,
    language_model("Gemma4CausalLM", GEMMA4),
    task(
        "Gemma4AssistantCausalLM",
        ASSISTANT,
        {"unable": dict.fromkeys(("tensorflow", "jax", "torch"), NO_CALL)},
        backbone_hidden_size=24,
        num_centroids=5,
        centroid_intermediate_top_k=2,
        use_ordered_embeddings=False,
    ),
    QWEN3_5,
    language_model("Qwen3_5CausalLM", QWEN3_5, unable=WRONG_RECURRENCE),
    QWEN3_5_MOE,
    language_model("Qwen3_5MoeCausalLM", QWEN3_5_MOE, unable=WRONG_RECURRENCE),
    RWKV7,
    language_model("RWKV7CausalLM", RWKV7, prompt=last_token_apart),
)
