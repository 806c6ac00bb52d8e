"""A Llama whose head is its table of tokens survives being saved."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_peft
from keras_peft.complete_configs import complete_configs
from keras_peft.export import single_precision

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def tied(dtype="float32"):
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=17,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        tie_word_embeddings=True,
        dtype=dtype,
    )


def outputs(model):
    return model.predict_on_batch(
        {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    )


def test_a_keras_file_of_an_adapted_model_is_read_back(tmp_path):
    model = tied()
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert other.token_embedding.tie_weights
    assert np.array_equal(outputs(other), outputs(model))


def test_a_copy_in_float32_is_one_of_the_same_model():
    copy = single_precision.as_float32(tied("bfloat16"))
    assert copy.token_embedding.tie_weights
    assert len(copy.variables) == len(tied().variables)


@pytest.mark.slice
def test_keras_hub_alone_still_loses_it(tmp_path):
    model = tied()
    assert "tie_word_embeddings" not in model.get_config(), (
        "keras-hub says it itself: remove `complete_configs`"
    )
    with complete_configs():
        assert model.get_config()["tie_word_embeddings"] is True
    assert "tie_word_embeddings" not in model.get_config()
