"""Laws of one adapted layer: methods x kinds of layers x dtypes."""

import keras
import numpy as np
import pytest
from table import DTYPES
from table import LAYERS
from table import METHODS
from table import method_rows
from table import rounding

from keras_peft import layer_tree
from keras_peft.kernels import kernel_of

METHODS_BY_LAYERS = method_rows()
numpy = keras.ops.convert_to_numpy


def attach(method, row, layer, scale=0.0):
    """The adapter of `method` on `layer`, moved from its start by `scale`."""
    settings = method.make()
    assert settings.accepts(layer)
    assert settings.objection("layer", layer) is None
    adapter = settings.create_all({"layer": layer}, "default")["layer"]
    adapter.start()
    rng = np.random.default_rng(1)
    for variable in adapter.learned:
        if scale:
            noise = rng.normal(scale=scale, size=variable.shape)
            variable.assign(numpy(variable) + noise.astype("float32"))
    layer_tree.attach(layer, "default", adapter)
    return adapter


def bound(row, layer, inputs, outputs, dtype, roundings):
    """What `roundings` per term may add up to over a kernel's inputs."""
    kernel = kernel_of(layer)
    terms = kernel.outputs if row.reverse else kernel.inputs
    if row.vocabulary and not row.reverse:
        terms = 1
    size = np.abs(kernel.read()).max()
    largest = 1.0 if terms == 1 else np.abs(inputs).max()
    product = terms * size * largest
    return roundings * rounding(dtype) * max(product, np.abs(outputs).max())


@pytest.mark.parametrize("method, row", METHODS_BY_LAYERS)
def test_a_fresh_adapter_leaves_the_outputs_as_they_were(method, row):
    layer, inputs = row.build()
    before = row.call(layer, inputs)
    attach(method, row, layer)
    after = row.call(layer, inputs)
    if method.exact_start:
        assert np.array_equal(before, after)
    else:
        # The change is a difference of equal products, summed in two orders.
        tolerance = bound(row, layer, inputs, before, "float32", 16)
        assert np.abs(after - before).max() <= tolerance


@pytest.mark.parametrize("method, row, dtype", method_rows(DTYPES))
def test_merged_equals_adapted(method, row, dtype):
    layer, inputs = row.build(dtype)
    base = row.call(layer, inputs)
    adapter = attach(method, row, layer, scale=1.0)
    adapted = row.call(layer, inputs)
    deltas = adapter.deltas()
    layer_tree.detach(layer, "default")
    for variable, change in deltas:
        value = numpy(keras.ops.cast(variable, "float32"))
        variable.assign(value + change)
    outputs = row.call(layer, inputs)
    # Kernel, A, B, the hidden product and the sum are each rounded once, on
    # either side of the comparison; DoRA rounds its two factors as well.
    tolerance = bound(row, layer, inputs, outputs, dtype, 12)
    assert np.abs(outputs - adapted).max() <= tolerance
    assert np.abs(adapted - base).max() > np.abs(outputs - adapted).max()


@pytest.mark.parametrize("method, row", METHODS_BY_LAYERS)
def test_the_merged_kernel_is_the_papers(method, row):
    layer, _ = row.build()
    kernel = kernel_of(layer)
    matrix = row.matrix(numpy(kernel.variable)).astype("float64")
    adapter = attach(method, row, layer, scale=1.0)
    arrays = {
        name: numpy(value).astype("float64")
        for name, value in adapter.parameters.items()
    }
    taps = {"taps": row.taps} if method.by_tap else {}
    expected = method.merged(matrix, method.make(), **taps, **arrays)
    changes = {id(variable): change for variable, change in adapter.deltas()}
    merged = numpy(kernel.variable) + changes.get(id(kernel.variable), 0.0)
    # float32 against float64: a product of rank 2, a norm of the inputs.
    terms = 4 + kernel.inputs
    tolerance = terms * 2.0**-23 * np.abs(expected).max()
    assert np.abs(row.matrix(merged) - expected).max() <= tolerance
    if kernel.bias is not None:
        bias = kernel.read_bias()
        change = changes.get(id(kernel.bias), np.zeros(()))
        found = bias + np.broadcast_to(change, kernel.bias.shape).ravel()
        expected = method.merged_bias(bias, method.make(), **arrays)
        assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize("method, row", METHODS_BY_LAYERS)
def test_the_parameter_count_is_the_formula(method, row):
    layer, _ = row.build()
    adapter = attach(method, row, layer)
    inputs, outputs = row.matrix(numpy(kernel_of(layer).variable)).shape
    count = sum(int(np.prod(v.shape)) for v in adapter.learned)
    taps = {"taps": row.taps} if method.by_tap else {}
    assert count == method.parameters(inputs, outputs, **taps)


@pytest.mark.parametrize(
    "method, row",
    [
        pytest.param(method, row, id=f"{name}-{layer}")
        for name, method in METHODS.items()
        for layer, row in LAYERS.items()
        # What is no change of weights is held to the laws of models.
        if method.mergeable and not method.takes(layer)
    ],
)
def test_a_layer_that_a_method_cannot_take_is_refused(method, row):
    layer, _ = row.build()
    settings = method.make()
    assert not settings.accepts(layer) or settings.objection("layer", layer)


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=n) for n, r in LAYERS.items()]
)
def test_detaching_leaves_no_trace(row):
    layer, inputs = row.build()
    before = row.call(layer, inputs)
    cls, attributes = type(layer), set(vars(layer))
    config, variables = layer.get_config(), list(map(id, layer.variables))
    attach(METHODS["lora"], row, layer, scale=1.0)
    layer_tree.detach(layer, "default")
    assert type(layer) is cls and set(vars(layer)) == attributes
    assert layer.get_config() == config
    assert list(map(id, layer.variables)) == variables
    assert np.array_equal(row.call(layer, inputs), before)


def test_an_untied_output_embedding_is_left_alone():
    layer = keras.layers.ReversibleEmbedding(11, 6, tie_weights=False)
    layer.build()
    hidden = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("float32")
    before = numpy(layer(hidden, reverse=True))
    attach(METHODS["lora"], LAYERS["reversible-tied"], layer, scale=1.0)
    assert np.array_equal(numpy(layer(hidden, reverse=True)), before)


def test_inputs_may_be_named():
    layer, inputs = LAYERS["dense"].build()
    attach(METHODS["lora"], None, layer, scale=1.0)
    assert np.array_equal(numpy(layer(inputs=inputs)), numpy(layer(inputs)))
