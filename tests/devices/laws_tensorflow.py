"""Laws of `tf.distribute.MirroredStrategy`, on two devices."""

import numpy as np
import pytest
import tensorflow as tf

# Before Keras is imported, which computes.
(CPU,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    CPU, [tf.config.LogicalDeviceConfiguration()] * 2
)

from laws import CLOSE  # noqa: E402
from laws import adapted  # noqa: E402
from laws import assert_same_training  # noqa: E402
from laws import base_of  # noqa: E402
from laws import predicted  # noqa: E402
from laws import trained  # noqa: E402
from models import build  # noqa: E402
from models import same_bits  # noqa: E402

import keras_peft  # noqa: E402
from keras_peft import training  # noqa: E402


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="module")
def on_one():
    model = adapted()
    return model, trained(model)


def compiled_and_trained(model, strategy):
    with strategy.scope():
        return trained(model)


def test_two_devices_train_as_one_does(strategy, on_one, tmp_path):
    with strategy.scope():
        model = adapted()
    before = base_of(model)
    losses = compiled_and_trained(model, strategy)
    assert_same_training((model, losses), on_one)
    assert same_bits(base_of(model), before)
    expected = predicted(model)
    keras_peft.save_adapter(model, tmp_path / "two")
    loaded = keras_peft.load_adapter(build("llama"), tmp_path / "two")
    np.testing.assert_allclose(predicted(loaded), expected, **CLOSE)
    keras_peft.merge(model)
    np.testing.assert_allclose(predicted(model), expected, **CLOSE)
    keras_peft.unmerge(model)
    assert same_bits(base_of(model), before)


def test_an_adapter_of_one_device_loads_on_two(strategy, on_one, tmp_path):
    keras_peft.save_adapter(on_one[0], tmp_path / "one")
    with strategy.scope():
        model = build("llama")
    keras_peft.load_adapter(model, tmp_path / "one")
    np.testing.assert_allclose(predicted(model), predicted(on_one[0]), **CLOSE)


def test_adapters_join_their_base_outside_of_the_scope(strategy, on_one):
    with strategy.scope():
        model = build("llama")
    training.prepare(adapted(model), remat="full", chunk_size=5)
    losses = compiled_and_trained(model, strategy)
    assert_same_training((model, losses), on_one)
