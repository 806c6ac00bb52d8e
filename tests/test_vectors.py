"""Laws of methods that add vectors to variables: biases, norms."""

import keras
import numpy as np
import pytest
from models import build
from models import same_bits
from models import values
from table import DTYPES
from table import randomize
from table import rounding

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree

k = keras.layers
numpy = keras.ops.convert_to_numpy
BIAS, NORM = keras_peft.BiasTuning, keras_peft.NormTuning
SHAPE = (3, 4, 6)

# By row: the layer, and the sizes of what each method adds to it.
LAYERS: dict[str, tuple] = {
    "layer-norm": (k.LayerNormalization, {NORM: 12, BIAS: 6}),
    "layer-norm-two-axes": (
        lambda: k.LayerNormalization(axis=(1, 2)),
        {NORM: 48, BIAS: 24},
    ),
    "layer-norm-no-offset": (
        lambda: k.LayerNormalization(center=False),
        {NORM: 6},
    ),
    "rms-norm": (k.RMSNormalization, {NORM: 6}),
    "batch-norm": (k.BatchNormalization, {NORM: 12, BIAS: 6}),
    "group-norm": (lambda: k.GroupNormalization(2), {NORM: 12, BIAS: 6}),
    "separable": (lambda: k.SeparableConv1D(5, 2), {BIAS: 5}),
    "transposed": (lambda: k.Conv1DTranspose(5, 2), {BIAS: 5}),
    # Statistics of data, and a wrapper that norms another layer's kernel.
    "data-norm": (k.Normalization, {}),
    "spectral-norm": (lambda: k.SpectralNormalization(k.Dense(5)), {}),
    "no-weights": (k.UnitNormalization, {}),
}
ROWS = [
    pytest.param(make, method, count, id=f"{method.__name__}-{name}")
    for name, (make, counts) in LAYERS.items()
    for method, count in counts.items()
]


def _build(make, dtype="float32"):
    keras.config.set_dtype_policy(dtype)
    try:
        layer = make()
    finally:
        keras.config.set_dtype_policy("float32")
    layer.build(SHAPE)
    rng = np.random.default_rng(0)
    for variable in layer.variables:
        if "seed_generator" not in variable.path:
            value = rng.uniform(0.5, 1.5, size=variable.shape)
            variable.assign(value.astype("float32"))
    return layer, rng.normal(size=SHAPE).astype("float32")


def _attach(method, layer, scale):
    assert method().accepts(layer)
    adapter = method().create("layer", layer, "default")
    adapter.start()
    rng = np.random.default_rng(1)
    for variable in adapter.learned:
        noise = rng.normal(scale=scale, size=variable.shape)
        variable.assign(noise.astype("float32"))
    layer_tree.attach(layer, "default", adapter)
    return adapter


def _call(layer, inputs):
    return numpy(keras.ops.cast(layer(inputs), "float32"))


@pytest.mark.parametrize("make, method, count", ROWS)
def test_a_fresh_vector_changes_no_bit_and_has_the_variables_size(
    make, method, count
):
    layer, inputs = _build(make)
    before = _call(layer, inputs)
    adapter = _attach(method, layer, scale=0.0)
    assert np.array_equal(_call(layer, inputs), before)
    assert sum(int(np.prod(v.shape)) for v in adapter.learned) == count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make, method, count", ROWS)
def test_merged_equals_adapted(make, method, count, dtype):
    layer, inputs = _build(make, dtype)
    base = _call(layer, inputs)
    adapter = _attach(method, layer, scale=0.5)
    adapted = _call(layer, inputs)
    deltas = adapter.deltas()
    layer_tree.detach(layer, "default")
    for variable, change in deltas:
        value = numpy(keras.ops.cast(variable, "float32"))
        variable.assign(value + change)
    # The same sum is rounded once, then the same program runs.
    assert np.array_equal(_call(layer, inputs), adapted)
    assert np.abs(adapted - base).max() > 8 * rounding(dtype)


@pytest.mark.parametrize(
    "make, method",
    [
        pytest.param(make, method, id=f"{method.__name__}-{name}")
        for name, (make, counts) in LAYERS.items()
        for method in (BIAS, NORM)
        if method not in counts
    ],
)
def test_layers_without_such_variables_are_no_candidates(make, method):
    assert not method().accepts(_build(make)[0])


def _small():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = k.Dense(8, activation="relu", name="first")(inputs)
    hidden = k.LayerNormalization(name="norm")(hidden)
    return keras.Model(inputs, k.Dense(3, activation="tanh")(hidden))


def _losses(model):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 5)), rng.normal(size=(16, 3))
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    history = model.fit(x, y, epochs=4, batch_size=8, shuffle=False, verbose=0)
    return history.history["loss"]


@pytest.mark.slice
@pytest.mark.parametrize(
    "method, trained",
    [(BIAS, ("bias", "beta")), (NORM, ("gamma", "beta"))],
    ids=["bias", "norm"],
)
def test_vectors_train_like_the_variables_themselves(method, trained):
    plain, adapted = _small(), _small()
    for variable in plain.trainable_variables:
        variable.trainable = variable.name in trained
    keras_peft.adapt(adapted, method(), head=[])
    expected = _losses(plain)
    # Sums of 8 products, 16 steps, that Adam's square root may spread.
    assert _losses(adapted) == pytest.approx(expected, rel=2.0**-24 * 8 * 64)
    assert expected[-1] < expected[0]


@pytest.mark.slice
@pytest.mark.parametrize("method", [BIAS, NORM])
def test_statistics_of_batch_normalization_stay_frozen(method):
    model = build("convolutional")
    keras_peft.adapt(model, method())
    randomize(model)
    leaves = adapter_state.leaves(model, "default")
    norm = next(la for la in model.layers if "batch_norm" in la.name)
    assert any(path.startswith("batch_norm") for path in leaves)
    own = [norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance]
    before, trained = values(own), values(model.trainable_variables)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    model.fit(x, np.array([0, 1, 2, 0]), verbose=0)
    assert same_bits(before, values(own))
    assert not same_bits(trained, values(model.trainable_variables))
