"""Laws of LoRA with learned magnitudes: what it computes alone at its layer."""

import keras
import numpy as np
import pytest
from table import randomize

import keras_peft

pytestmark = pytest.mark.slice
numpy = keras.ops.convert_to_numpy
TOKENS, INPUTS, OUTPUTS = 24, 6, 8
# Several axes of outputs, at the end and not; a bias, and none.
LAYERS = {
    "dense": lambda: keras.layers.Dense(OUTPUTS, bias_initializer="normal"),
    "dense-no-bias": lambda: keras.layers.Dense(OUTPUTS, use_bias=False),
    "heads": lambda: keras.layers.EinsumDense("abc,cde->abde", (4, 2, 4)),
    "heads-first": lambda: keras.layers.EinsumDense("abc,cde->adbe", (2, 4, 4)),
    "convolution": lambda: keras.layers.Conv1D(OUTPUTS, 2, padding="same"),
}


def adapted(make, *others, **settings):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4, INPUTS)), make()])
    dora = keras_peft.LoRA(2, alpha=3, decompose=True, **settings)
    for name, method in zip("ab", (dora, *others), strict=False):
        layer = model.layers[0].name
        keras_peft.adapt(model, method, targets=[layer], name=name)
        randomize(model, name)
    return model


def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(TOKENS // 4, 4, INPUTS)).astype("float32")


def changes_in_a_step(model):
    """`[the change of each weight of adapter "a"]`."""
    targets = np.random.default_rng(1).normal(size=model(inputs()).shape)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    weights = model.trainable_variables
    before = [numpy(weight) for weight in weights]
    model.train_on_batch(inputs(), targets.astype("float32"))
    pairs = zip(weights, before, strict=True)
    return [numpy(weight) - old for weight, old in pairs]


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("strength", [1.0, 0.5, -0.25, 0.0])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_it_computes_and_learns_what_it_does_beside_another(
    make, strength, init
):
    alone = adapted(make, init=init)
    beside = adapted(make, keras_peft.LoRA(2), init=init)
    keras_peft.set_adapter(alone, {"a": strength})
    keras_peft.set_adapter(beside, {"a": strength})
    expected = numpy(beside(inputs()))
    # To the rounding of sums of 2 INPUTS products, and of TOKENS of them.
    for found, wanted in zip(
        [numpy(alone(inputs())), *changes_in_a_step(alone)],
        [expected, *changes_in_a_step(beside)],
        strict=True,
    ):
        size = np.abs(wanted).max()
        assert size > 0 or strength == 0
        np.testing.assert_allclose(found, wanted, atol=2**-21 * TOKENS * size)


def test_a_column_of_zeros_is_a_column_like_others():
    model = keras.Sequential([keras.Input((INPUTS,)), keras.layers.Dense(3)])
    kernel, bias = model.get_weights()
    kernel[:, 1] = 0
    model.set_weights([kernel, bias])
    x, y = np.ones((2, INPUTS), "float32"), np.ones((2, 3), "float32")
    before = numpy(model(x))
    keras_peft.adapt(model, keras_peft.LoRA(2, decompose=True))
    # The norm is made of two roundings more than its square is kept with.
    np.testing.assert_allclose(numpy(model(x)), before, rtol=2**-20)
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    trained = numpy(model(x))
    assert np.isfinite(trained).all() and np.abs(trained - before).max() > 0
    keras_peft.merge(model)
    np.testing.assert_allclose(numpy(model(x)), trained, rtol=2**-20)


def test_gradients_of_magnitudes_are_summed_in_float32():
    """A sum of ones in bfloat16 gets no further than 256."""
    tokens, width = 4096, 4
    layer = keras.layers.Dense(
        width, use_bias=False, kernel_initializer="ones", dtype="bfloat16"
    )
    model = keras.Sequential([keras.Input((tokens, 1)), layer])
    layer = model.layers[0].name
    method = keras_peft.LoRA(1, decompose=True)
    keras_peft.adapt(model, method, targets=[layer])
    model.compile(
        keras.optimizers.SGD(1.0),
        # Upstream gradients of 1, which bfloat16 has.
        lambda true, computed: keras.ops.sum(computed, axis=(1, 2)),
    )
    (magnitude,) = (
        w for w in model.trainable_variables if "magnitude" in w.path
    )
    before = numpy(magnitude)
    model.train_on_batch(
        np.ones((1, tokens, 1)), np.zeros((1, tokens, width), "float32")
    )
    # All columns are 1: so are their norms, and each output.
    np.testing.assert_array_equal(before - numpy(magnitude), tokens)
