"""Laws of steps that a GPU repeats by itself."""

import keras
import numpy as np
import pytest
from test_training_distribution import TORCHRUN
from test_training_distribution import hold

import keras_peft


def gpus():
    if keras.config.backend() != "torch":
        return 0
    import torch

    return torch.cuda.device_count()


def has_gpu():
    return gpus() > 0


def tiny(dropout=0.0):
    inputs = keras.Input((6,), dtype="int32")
    hidden = keras.layers.Embedding(30, 16)(inputs)
    hidden = keras.layers.Dense(32, activation="gelu")(hidden)
    hidden = keras.layers.Dropout(dropout)(hidden)
    model = keras.Model(inputs, keras.layers.Dense(30)(hidden))
    model.compile(
        keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.1, 9)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def fit(model):
    tokens = np.random.default_rng(0).integers(0, 30, (35, 6))
    history = model.fit(tokens, tokens, epochs=5, verbose=0, shuffle=False)
    return history.history


@pytest.mark.skipif(not has_gpu(), reason="needs torch and a GPU")
@pytest.mark.parametrize("remat", [None, "full"])
def test_recorded_steps_train_as_others_do(remat):
    """Batches of two shapes: the last of an epoch is smaller."""
    model = tiny()
    weights = model.get_weights()
    expected, after = fit(model), model.get_weights()
    other = tiny()
    other.set_weights(weights)
    keras_peft.training.prepare(other, capture=True)
    found = fit(other)
    for name, values in expected.items():
        # The same operations; sums of floats may take another order.
        assert np.allclose(found[name], values, rtol=1e-4), name
    for one, two in zip(after, other.get_weights(), strict=True):
        assert np.allclose(one, two, atol=1e-4)
    keras_peft.training.restore(other)
    fit(other)


@pytest.mark.skipif(gpus() < 2, reason="needs torch and two GPUs")
def test_laws_hold_in_two_processes():
    hold("laws_torch_gpus.py", TORCHRUN)


@pytest.mark.skipif(not has_gpu(), reason="needs torch and a GPU")
def test_random_numbers_are_refused():
    with pytest.raises(ValueError, match="draws random numbers"):
        keras_peft.training.capture_steps(tiny(dropout=0.1))


@pytest.mark.skipif(has_gpu(), reason="is about machines without")
def test_without_torch_and_a_gpu_it_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="Steps are recorded by torch"):
        keras_peft.training.prepare(model, capture=True)
    assert "call" not in vars(model)
    fit(model)
