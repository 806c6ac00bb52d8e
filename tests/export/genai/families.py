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


# A new family is one row.
FAMILIES = {
    "gpt2": gpt2,
    "llama": llama,
    "llama_long": llama_long,
    "llama_tied": llama_tied,
}


def build(name, seed=0):
    """The model of a row, every weight moved: no bias is zero, no norm one."""
    model = FAMILIES[name]()
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
