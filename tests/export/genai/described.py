"""Small language models with random weights: one row for each family."""

import keras
import keras_hub
import numpy as np

VOCABULARY = 61


def _llama(**rest):
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=96,
        **rest,
    )
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def llama():
    return _llama()


def llama_tied():
    return _llama(tie_word_embeddings=True)


def llama_long():
    """Frequencies as Llama 3.1 adjusts them."""
    return _llama(
        rope_frequency_adjustment_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=32,
    )


def gpt2():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=96,
        max_sequence_length=96,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def _other(name, **rest):
    """Four heads of 16 channels, as most models build them."""
    sizes = dict(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        hidden_dim=64,
        intermediate_dim=96,
    )
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**sizes | rest)
    causal_lm = getattr(keras_hub.models, f"{name}CausalLM")
    return causal_lm(backbone=backbone, preprocessor=None)


GROUPED = dict(num_query_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts=5, top_k=2, **GROUPED)


def opt():
    return _other("OPT", num_heads=4, max_sequence_length=96)


def bloom():
    return _other("Bloom", num_heads=4)


def bloom_six():
    """Slopes of heads that are no power of two."""
    return _other("Bloom", num_heads=6, hidden_dim=96)


def falcon():
    return _other("Falcon", num_attention_heads=4)


def gpt_neo_x():
    """Five pairs of a head's 16 are turned."""
    return _other(
        "GPTNeoX",
        num_heads=2,
        rotary_percentage=0.3125,
        max_sequence_length=96,
    )


def phi3():
    return _other("Phi3", max_sequence_length=96, **GROUPED)


def phi3_long():
    """Made for more tokens than it was first trained on."""
    return _phi3_long(128)


def _phi3_long(after):
    return _other(
        "Phi3",
        max_sequence_length=4 * after,
        pretraining_sequence_length=after,
        rope_scaling_type="su",
        rope_scaling_short_factor=[1.0 + 0.1 * i for i in range(8)],
        rope_scaling_long_factor=[2.0 + i for i in range(8)],
        **GROUPED,
    )


def phi3_switching():
    """The same, of which the texts of tests are long ones."""
    return _phi3_long(16)


def mixtral():
    return _other("Mixtral", sliding_window=9, **EXPERTS)


def qwen_moe():
    return _other(
        "QwenMoe",
        moe_intermediate_dim=32,
        shared_expert_intermediate_dim=48,
        use_sliding_window_attention=True,
        sliding_window_size=9,
        **EXPERTS,
    )


def qwen3_moe():
    return _other(
        "Qwen3Moe",
        head_dim=32,
        moe_intermediate_dim=32,
        mlp_only_layers=[0],
        norm_top_k_prob=True,
        tie_word_embeddings=True,
        **EXPERTS,
    )


def gpt_oss():
    """Frequencies and attention as YaRN stretches them."""
    return _other(
        "GptOss",
        sliding_window=9,
        head_dim=32,
        rope_scaling_factor=8.0,
        **EXPERTS,
    )


def mistral():
    """A window that the tests' texts do not fit in."""
    return _other("Mistral", sliding_window=7, **GROUPED)


def qwen():
    return _other("Qwen", **GROUPED)


def qwen3():
    """Heads wider than the stream, as the smallest of the family has."""
    return _other("Qwen3", head_dim=32, **GROUPED)


def smollm3():
    return _other(
        "SmolLM3",
        num_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=False,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False, True],
        layer_types=["full_attention"] * 3,
        mlp_bias=False,
        layer_norm_epsilon=1e-6,
        max_position_embeddings=128,
        rope_theta=10_000.0,
        partial_rotary_factor=1.0,
    )


def gemma():
    return _other("Gemma", head_dim=32, **GROUPED)


AFTER_NORMS = dict(
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    use_sliding_window_attention=True,
    sliding_window_size=7,
    **GROUPED,
)


def gemma2():
    return _other(
        "Gemma",
        head_dim=16,
        attention_logit_soft_cap=5.0,
        final_logit_soft_cap=3.0,
        **AFTER_NORMS,
    )


def gemma3():
    """With the sixth block, the first that sees everything."""
    return _other(
        "Gemma3",
        num_layers=6,
        head_dim=16,
        image_size=None,
        use_query_key_norm=True,
        global_rope_scaling_factor=8.0,
        **AFTER_NORMS,
    )


# A new family is one row.
FAMILIES = {
    "bloom": bloom,
    "bloom_six": bloom_six,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "gpt_neo_x": gpt_neo_x,
    "gpt_oss": gpt_oss,
    "llama": llama,
    "llama_long": llama_long,
    "llama_tied": llama_tied,
    "mistral": mistral,
    "mixtral": mixtral,
    "opt": opt,
    "phi3": phi3,
    "phi3_long": phi3_long,
    "qwen": qwen,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen_moe": qwen_moe,
    "smollm3": smollm3,
}


def build(name, seed=0):
    """The model of a row, every weight moved: no bias is zero, no norm one."""
    return moved(FAMILIES[name](), seed)


def moved(model, seed=0):
    """The model, each of its weights somewhere else."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = rng.normal(0.0, 0.1, variable.shape).astype("float32")
        variable.assign_add(noise)
    return model


def logits(model, ids):
    """What Keras computes for a batch of token ids without padding."""
    ids = np.asarray(ids, "int32")
    mask = np.ones_like(ids)
    outputs = model({"token_ids": ids, "padding_mask": mask}, training=False)
    return keras.ops.convert_to_numpy(outputs)
