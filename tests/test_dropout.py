"""Laws of the dropout of adapters."""

import keras
import numpy as np
import pytest

from keras_peft.methods.dropout import Dropout

pytestmark = pytest.mark.slice
RATE, SIZE = 0.1, 1024
# Five times how much a share of so many draws deviates.
CLOSE = 5 * (RATE * (1 - RATE)) ** 0.5 / SIZE


def dropped(layer, training=True, dtype="float32"):
    """Where the layer puts zeros."""
    ones = keras.ops.ones((SIZE, SIZE), dtype)
    outputs = layer(ones, training=training)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    found = keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))
    kept = found[found != 0]
    if training:
        factor = keras.ops.cast(keras.ops.ones(()) / (1 - RATE), dtype)
        # To one rounding of half precision.
        assert np.allclose(kept, float(factor), rtol=2**-8)
    return found == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_share_is_dropped_and_the_rest_is_scaled(dtype):
    zeros = dropped(Dropout(RATE, seed=0), dtype=dtype)
    assert abs(zeros.mean() - RATE) < CLOSE
    # Rows and columns alike: as often as independent draws.
    for axis in (0, 1):
        spread = zeros.mean(axis).std()
        assert 0.9 < spread / (RATE * (1 - RATE) / SIZE) ** 0.5 < 1.1


def together(one, other):
    """How much more often both are dropped than by chance."""
    return (one & other).mean() - RATE**2


def test_draws_do_not_depend_on_each_other():
    first, second = Dropout(RATE, seed=0), Dropout(RATE, seed=1)
    zeros = dropped(first)
    others = [dropped(first), dropped(first), dropped(second)]
    others += [np.roll(zeros, 2**n, axis) for n in range(10) for axis in (0, 1)]
    assert all(abs(together(zeros, other)) < CLOSE for other in others)


def test_a_seed_gives_the_same_numbers():
    keras.utils.set_random_seed(0)
    first = dropped(Dropout(RATE, seed=3))
    keras.utils.set_random_seed(0)
    assert np.array_equal(dropped(Dropout(RATE, seed=3)), first)


def test_nothing_is_dropped_but_in_training():
    assert not dropped(Dropout(RATE), training=False).any()
    assert not dropped(Dropout(RATE), training=None).any()


@pytest.mark.skipif(keras.config.backend() != "jax", reason="reads the jaxpr")
def test_it_draws_without_threefry():
    import jax

    layer = Dropout(RATE)
    with keras.StatelessScope():
        program = jax.make_jaxpr(lambda x: layer(x, training=True))(np.ones(8))
    assert "threefry" not in str(program)
    assert "random_bits" not in str(program)
