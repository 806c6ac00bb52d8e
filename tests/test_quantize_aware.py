"""Laws of LoRA that trains in the integers it ships."""

import re

import keras
import numpy as np
import pytest
from table import LAYERS
from table import Layer
from table import randomize

import keras_peft
from keras_peft import layer_tree
from keras_peft import quantize_aware
from keras_peft.adapter_state import leaves
from keras_peft.calibration import LayerInputs
from keras_peft.export.blockwise import gptq
from keras_peft.export.blockwise import search
from keras_peft.kernels import kernel_of
from keras_peft.methods.quantize_aware import QuantizeAwareLoRA
from keras_peft.methods.quantize_aware import exact_product
from keras_peft.methods.quantize_aware import from_pairs
from keras_peft.methods.quantize_aware import in_pairs

numpy = keras.ops.convert_to_numpy

# Several blocks, of which the last is shorter.
MANY = Layer(
    lambda: keras.layers.Dense(6), (3, 70), lambda kernel: kernel, slice=True
)
ROWS = {
    "dense-many": MANY,
    **{
        name: row
        for name, row in LAYERS.items()
        if name.startswith(("dense", "einsum"))
    },
}
ROWS_OF_TEST = pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, row in ROWS.items()]
)
BITS_OF_TEST = pytest.mark.parametrize("bits", [4, 8])


def seen(layer, inputs):
    observed = LayerInputs(layer)
    observed.add(keras.ops.convert_to_tensor(inputs))
    return observed


def chosen(layer, inputs, bits):
    """The integers that the exporter would store."""
    kernel, observed = kernel_of(layer).read(), seen(layer, inputs)
    if bits == 4:
        return gptq(kernel, observed.gram / observed.count, 4)
    return search(kernel, 8, 32, observed.mean_squares)


def nearest(kernel, stored):
    """The levels of a kernel, zero points included, none of them clipped."""
    inverse, zeros = (
        np.repeat(grid, 32, axis=1)[:, : stored.inputs].T
        for grid in (1 / stored.scales, stored.zero_points)
    )
    return np.rint(kernel * inverse) + zeros


def attach(layer, inputs, bits, scale=0.05, **settings):
    method = QuantizeAwareLoRA(bits, rank=2, **settings)
    assert method.accepts(layer) and method.objection("layer", layer) is None
    adapter = method.create("layer", layer, "default")
    adapter.start(seen(layer, inputs))
    rng = np.random.default_rng(1)
    for variable in adapter.learned:
        noise = rng.normal(scale=scale, size=variable.shape)
        variable.assign(numpy(variable) + noise.astype("float32"))
    layer_tree.attach(layer, "default", adapter)
    return adapter


def few_bits(factor, rank=2):
    """A factor as multiples of a power of two that fits its largest entry."""
    bits = min(10, (24 - int(np.ceil(np.log2(rank)))) // 2)
    power = 2.0 ** np.ceil(np.log2(np.abs(factor).max()))
    unit = np.float32(power / 2**bits)
    return np.rint(factor / unit) * unit


def expected_change(adapter):
    """`scale * A @ B` of the rounded factors: exact, in float64."""
    a = few_bits(numpy(adapter.lora_kernel_a))
    b = few_bits(numpy(adapter.lora_kernel_b) * np.float32(adapter.scale))
    return a.astype("float64") @ b.astype("float64")


# -- Integers ----------------------------------------------------------------


@ROWS_OF_TEST
@BITS_OF_TEST
def test_it_starts_from_the_integers_that_the_exporter_chooses(row, bits):
    layer, inputs = row.build()
    adapter = attach(layer, inputs, bits, scale=0.0)
    stored, expected = adapter.integers(), chosen(layer, inputs, bits)
    assert np.array_equal(stored.values, expected.values)
    assert np.array_equal(stored.zero_points, expected.zero_points)
    # An inverse is kept: inverted again, it has been rounded twice.
    np.testing.assert_allclose(stored.scales, expected.scales, rtol=2.0**-23)
    assert (stored.bits, stored.block_size) == (bits, 32)


@ROWS_OF_TEST
@BITS_OF_TEST
def test_each_weight_moves_from_there_as_its_nearest_level_does(row, bits):
    layer, inputs = row.build()
    adapter = attach(layer, inputs, bits, alpha=3)
    start, stored = chosen(layer, inputs, bits), adapter.integers()
    kernel = kernel_of(layer).read()
    changed = kernel + expected_change(adapter).astype("float32")
    moved = nearest(changed, start) - nearest(kernel, start)
    beside = start.values.T - nearest(kernel, start) if bits == 4 else 0
    values = nearest(changed, start) + beside
    # Bit for bit, and so on every backend the same.
    assert np.array_equal(stored.values.T, values.clip(0, 2**bits - 1))
    assert moved.any()


def test_offsets_keep_four_bits():
    offsets = np.arange(-20.0, 21)[:, None] + np.arange(2)
    pairs = in_pairs(offsets)
    assert pairs.shape == (21, 2) and pairs.dtype == "uint8"
    again = numpy(from_pairs(keras.ops.convert_to_tensor(pairs), 41))
    assert np.array_equal(again, offsets.clip(-8, 7))


@ROWS_OF_TEST
@BITS_OF_TEST
def test_the_layer_computes_with_the_kernel_that_ships(row, bits):
    layer, inputs = row.build()
    adapter = attach(layer, inputs, bits)
    adapted = row.call(layer, inputs)
    stored = adapter.integers()
    layer_tree.detach(layer, "default")
    before = row.call(layer, inputs)
    layer.kernel.assign(kernel_of(layer).from_matrix(stored.kernel()))
    shipped = row.call(layer, inputs)
    # The kernel is the base plus a difference from it, rounded once more.
    size = np.abs(stored.kernel()).max() * np.abs(inputs).max()
    tolerance = 2 * 2.0**-24 * stored.inputs * size
    assert np.abs(shipped - adapted).max() <= tolerance
    assert np.abs(before - adapted).max() > tolerance


@pytest.mark.parametrize("rank", [1, 8, 64, 200])
def test_no_order_of_summing_changes_the_product(rank):
    rng = np.random.default_rng(rank)
    a = rng.normal(scale=0.03, size=(9, rank)).astype("float32")
    b = rng.normal(scale=1e-4, size=(rank, 7)).astype("float32")
    product = numpy(exact_product(*map(keras.ops.convert_to_tensor, (a, b))))
    exact = few_bits(a, rank).astype("float64") @ few_bits(b, rank)
    # In float64 no such sum rounds; that it is float32's says none did there.
    assert np.array_equal(product, exact)
    for factor in (a, b):
        rounded = few_bits(factor, rank)
        # 8 bits of a power of two below twice the largest, at rank 200.
        assert np.abs(rounded - factor).max() <= np.abs(factor).max() / 2**8
        # What TF32 multiplies by: 11 bits.
        kept = np.frombuffer(rounded.tobytes(), "uint32") & 0xFFFFE000
        assert np.array_equal(kept.view("float32"), rounded.ravel())


def test_factors_of_zero_change_nothing():
    zeros = keras.ops.zeros((5, 2))
    assert not numpy(exact_product(zeros, keras.ops.transpose(zeros))).any()


@BITS_OF_TEST
@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_residual_start_rounds_the_base_alone(init, bits):
    layer, inputs = MANY.build()
    stored = attach(layer, inputs, bits, scale=0.0, init=init).integers()
    expected = chosen(layer, inputs, bits)
    assert np.array_equal(stored.values, expected.values)


@BITS_OF_TEST
def test_half_precision_keeps_the_integers(bits):
    layer, inputs = MANY.build("bfloat16")
    adapter = attach(layer, inputs, bits, scale=0.0)
    stored = adapter.integers()
    expected = chosen(layer, inputs, bits)
    assert np.array_equal(stored.values, expected.values)
    assert np.isfinite(MANY.call(layer, inputs)).all()
    # Merged into bfloat16, each value is still nearest to its own integer.
    layer.kernel.assign(stored.kernel())
    assert np.array_equal(adapter.integers(merged=True).values, stored.values)


# -- Training ----------------------------------------------------------------


@BITS_OF_TEST
def test_the_gradient_passes_the_rounding_where_nothing_is_clipped(bits):
    layer, inputs = MANY.build()
    adapter = attach(layer, inputs, bits, scale=0.2)
    model = keras.Sequential([keras.Input((70,)), layer])
    for variable in layer.variables:
        variable.trainable = variable is adapter.lora_kernel_b
    stored = adapter.integers()
    before = numpy(adapter.lora_kernel_b)
    outputs = MANY.call(layer, inputs).astype("float64")
    of_kernel = inputs.T.astype("float64") @ (2 * outputs / outputs.size)
    merged = kernel_of(layer).read() + expected_change(adapter)
    steps, zeros = (
        np.repeat(grid, 32, axis=1)[:, :70].T.astype("float64")
        for grid in (stored.scales, stored.zero_points)
    )
    levels = merged / steps + zeros
    if bits == 4:
        start = chosen(layer, inputs, bits)
        levels += start.values.T - nearest(kernel_of(layer).read(), start)
    inside = (levels > 0) & (levels < 2**bits - 1)
    assert 0.1 < inside.mean() < 1
    a = few_bits(numpy(adapter.lora_kernel_a)).astype("float64")
    expected = a.T @ (of_kernel * inside)
    model.compile(keras.optimizers.SGD(1.0), "mean_squared_error")
    model.fit(inputs, np.zeros((3, 6)), batch_size=3, verbose=0)
    found = before - numpy(adapter.lora_kernel_b)
    # Sums of 70 products, and the step itself is rounded.
    tolerance = 70 * 2.0**-23 * np.abs(of_kernel).max() * np.abs(a).max()
    tolerance += 2.0**-23 * np.abs(before).max()
    assert np.abs(found - expected).max() <= tolerance


def build_model(seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((48,))
    x = keras.layers.Dense(40, activation="tanh", name="first")(inputs)
    x = keras.layers.Dense(24, name="second")(x)
    return keras.Model(inputs, keras.layers.Dense(5, name="top")(x))


def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(64, 48)).astype("float32")
    return inputs, np.tanh(inputs @ rng.normal(size=(48, 5)) / 7)


def adapt(model, quantize_aware="int4", method=None, **options):
    options.setdefault("calibration", data()[0])
    options.setdefault("head", ["top"])
    return keras_peft.adapt(
        model,
        method or keras_peft.LoRA(rank=4),
        targets=["first", "second"],
        quantize_aware=quantize_aware,
        **options,
    )


def train(model, epochs=30):
    model.compile(keras.optimizers.Adam(3e-3), "mean_squared_error")
    model.fit(*data(), epochs=epochs, batch_size=32, verbose=0)
    return model


def test_training_makes_up_for_the_rounding():
    inputs, _ = data()
    targets = build_model().predict(inputs, verbose=0)
    model = adapt(build_model(), method=keras_peft.LoRA(rank=8), head=[])
    rate = keras.optimizers.schedules.PolynomialDecay(1e-3, 240, 0.0)
    model.compile(keras.optimizers.Adam(rate), "mean_squared_error")
    before = model.evaluate(inputs, targets, verbose=0)
    model.fit(inputs, targets, epochs=120, batch_size=32, verbose=0)
    # The targets are the base's own outputs: rounding is all that is lost.
    assert model.evaluate(inputs, targets, verbose=0) < 0.6 * before


def test_only_the_factors_and_the_head_train():
    model = adapt(build_model())
    adapters = leaves(model, "default").values()
    expected = {v.path for a in adapters for v in a.pairs[0]}
    expected |= {v.path for v in model.get_layer("top").variables}
    assert {v.path for v in model.trainable_variables} == expected
    grids = [numpy(a.inverse_scales) for a in adapters]
    train(model, 1)
    for adapter, grid in zip(adapters, grids, strict=True):
        assert np.array_equal(numpy(adapter.inverse_scales), grid)
        count = sum(int(np.prod(v.shape)) for v in adapter.learned)
        kernel = adapter.kernel
        assert count == 4 * (kernel.inputs + kernel.outputs)


def test_calibration_chooses_the_grid_by_the_inputs():
    inputs = data()[0].copy()
    inputs[:, :4] *= 30
    errors = []
    for calibration in (inputs, np.ones_like(inputs)):
        model = adapt(build_model(), calibration=calibration)
        stored = quantize_aware.integers(model)["first"]
        lost = inputs @ (
            stored.kernel() - numpy(model.get_layer("first").kernel)
        )
        errors.append(np.square(lost).mean())
    assert errors[0] < errors[1]


# -- What ships --------------------------------------------------------------


def same(one, other):
    assert one.keys() == other.keys()
    return all(
        np.array_equal(one[path].values, other[path].values)
        and np.array_equal(one[path].kernel(), other[path].kernel())
        for path in one
    )


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_merging_writes_exactly_the_values_of_the_integers(kind):
    model = adapt(build_model(), kind)
    randomize(model, scale=0.05)
    trained = quantize_aware.integers(model)
    adapted = model.predict(data()[0], verbose=0)
    keras_peft.merge(model)
    for path, stored in trained.items():
        kernel = numpy(model.get_layer(path).kernel)
        assert np.array_equal(kernel, stored.kernel())
    assert same(quantize_aware.integers(model), trained)
    merged = model.predict(data()[0], verbose=0)
    # One more rounding of each kernel before it is merged; three layers.
    tolerance = 3 * 48 * 2.0**-23 * np.abs(merged).max()
    assert np.abs(merged - adapted).max() <= tolerance
    keras_peft.unmerge(model)
    assert same(quantize_aware.integers(model), trained)


def test_without_such_an_adapter_there_are_no_integers():
    model = build_model()
    assert quantize_aware.integers(model) == {}
    adapt(model, None, calibration=None)
    assert quantize_aware.integers(model) == {}
    adapt_again = keras_peft.LoRA(rank=2)
    keras_peft.remove(model)
    keras_peft.adapt(model, adapt_again, targets=["first"])
    keras_peft.merge(model)
    assert quantize_aware.integers(model) == {}


def test_a_kernel_changed_since_merging_has_no_integers():
    model = adapt(build_model())
    keras_peft.merge(model)
    kernel = model.get_layer("first").kernel
    kernel.assign(numpy(kernel) * 1.5)
    assert quantize_aware.integers(model) == {}


def test_an_adapter_folder_brings_the_integers_back(tmp_path):
    model = adapt(build_model())
    randomize(model, scale=0.05)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    fresh = keras_peft.load_adapter(build_model(), tmp_path / "adapter")
    trained = quantize_aware.integers(model)
    assert same(quantize_aware.integers(fresh), trained)
    outputs = [m.predict(data()[0], verbose=0) for m in (model, fresh)]
    assert np.array_equal(*outputs)


def test_a_saved_model_brings_the_integers_back(tmp_path):
    model = adapt(build_model())
    randomize(model, scale=0.05)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    trained = quantize_aware.integers(model)
    assert same(quantize_aware.integers(loaded), trained)


def test_switched_off_the_base_computes_in_floating_point():
    model = build_model()
    before = model.predict(data()[0], verbose=0)
    adapt(model)
    randomize(model)
    with keras_peft.disabled(model):
        outputs = model.predict(data()[0], verbose=0)
    assert np.array_equal(outputs, before)
    assert not np.array_equal(model.predict(data()[0], verbose=0), before)


# -- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(quantize_aware="int3"), "'int4', 'int8' or None"),
        (
            dict(method=keras_peft.LoHa(2)),
            "`quantize_aware` is for `keras_peft.LoRA`",
        ),
        (
            dict(method=keras_peft.LoRA(2, decompose=True, dropout=0.1)),
            "leaves no place for 'dropout', 'decompose'",
        ),
        (dict(calibration=None), "Pass `calibration`"),
        (dict(method=keras_peft.LoRA(1000)), "rank 1000 is larger"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(options, message):
    model = build_model()
    before = [v.path for v in model.trainable_variables]
    with pytest.raises(ValueError, match=re.escape(message)):
        adapt(model, **options)
    assert [v.path for v in model.trainable_variables] == before


def test_a_kernel_that_another_adapter_changes_has_no_integers():
    model = adapt(build_model())
    keras_peft.adapt(model, keras_peft.LoRA(2), targets=["first"], name="more")
    keras_peft.set_adapter(model, ["default", "more"])
    with pytest.raises(ValueError, match="other changes of \\['first'\\]"):
        quantize_aware.integers(model)
    keras_peft.set_adapter(model, {"default": 0.5})
    with pytest.raises(ValueError, match="only with its own adapter"):
        quantize_aware.integers(model)
