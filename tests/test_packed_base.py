"""Laws of a base in 4 or 8 bits."""

import json

import keras
import numpy as np
import pytest
from models import draw_biases
from models import learn_classes
from models import summary_of

import keras_peft
from keras_peft import adapter_state
from keras_peft import base_format
from keras_peft import layer_tree
from keras_peft.quantized import FORMATS

k = keras.layers
METHODS = {
    "LoRA": keras_peft.LoRA(rank=4),
    "DoRA": keras_peft.LoRA(rank=4, decompose=True),
    "PiSSA": keras_peft.LoRA(rank=4, init="pissa"),
    "dropout": keras_peft.LoRA(rank=4, dropout=0.2),
    "LoHa": keras_peft.LoHa(rank=4),
    "OFT": keras_peft.OFT(block_size=8),
    "IA3": keras_peft.IA3(),
    "SHiRA": keras_peft.SHiRA(rank=3),
    "RoAd": keras_peft.RoAd(group_size=8),
    "BiasTuning": keras_peft.BiasTuning(),
}


def tiny(dtype="float32"):
    """A classifier over kernels of every layout, and one too thin to pack."""
    inputs = keras.Input((6, 64))
    hidden = k.Dense(128, activation="gelu", dtype=dtype)(inputs)
    hidden = k.EinsumDense(
        "btd,ndh->btnh", (None, 4, 32), bias_axes="nh", dtype=dtype
    )(hidden)
    hidden = k.EinsumDense("btnh,nhd->btd", (None, 64), dtype=dtype)(hidden)
    hidden = k.Dense(96, use_bias=False, dtype=dtype)(hidden)
    hidden = k.Dense(64, dtype=dtype)(hidden)
    hidden = k.Dense(8, dtype=dtype)(hidden)
    backbone = keras.Model(inputs, hidden, name="backbone")
    inputs = keras.Input((6, 64))
    outputs = k.Dense(3, name="logits", dtype=dtype)(backbone(inputs))
    return draw_biases(keras.Model(inputs, outputs))


def data(rows=4):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 6, 64)).astype("float32")
    return inputs, rng.integers(0, 3, (rows, 6))


def trained(model, steps=3):
    return learn_classes(model, *data(), steps)


def kernels(model):
    """`{path: array}` of what the layers compute with."""
    return {
        path: keras.ops.convert_to_numpy(
            keras.ops.cast(layer.kernel, "float32")
        )
        for path, layer in layer_tree.walk(model)
        if hasattr(layer, "kernel")
    }


def outputs_of(model):
    return keras.ops.convert_to_numpy(
        keras.ops.cast(model(data()[0]), "float32")
    )


@pytest.mark.parametrize("base", FORMATS)
def test_every_large_kernel_outside_the_head_is_rounded(base):
    model = tiny()
    before = kernels(model)
    keras_peft.adapt(model, METHODS["LoRA"], base=base)
    after, form = kernels(model), FORMATS[base]
    packed = base_format.formats(model)
    assert set(packed.values()) == {base}
    assert len(packed) == 5
    layers = dict(layer_tree.walk(model))
    for path, kernel in before.items():
        if path not in packed:
            assert np.array_equal(after[path], kernel), path
            continue
        view = layers[path].kernel.view
        expected = view.from_matrix(form.round(view.to_matrix(kernel)))
        assert np.allclose(after[path], expected, atol=1e-6), path
        assert not np.allclose(after[path], kernel, atol=1e-6), path


def cases():
    for name in METHODS:
        # What methods do is the same over every format.
        for base in FORMATS if name == "LoRA" else ["nf4"]:
            slice = [pytest.mark.slice] if name in ("LoRA", "DoRA") else []
            yield pytest.param(name, base, marks=slice, id=f"{name}-{base}")


@pytest.mark.parametrize(("name", "base"), cases())
def test_fresh_is_the_rounded_base_and_merged_is_trained(name, base):
    plain = tiny()
    weights = plain.get_weights()
    model = tiny()
    model.set_weights(weights)
    targets = None if name == "BiasTuning" else "all-linear"
    keras_peft.adapt(model, METHODS[name], targets, base=base)
    # The same function on plain kernels of the rounded values.
    rounded = kernels(model)
    for path, layer in layer_tree.walk(plain):
        if path in rounded:
            layer.kernel.assign(rounded[path])
    fresh = outputs_of(plain)
    # Float32, sums of 128 products of about 0.1 and 1: 1e-6 of the largest.
    near = dict(rtol=1e-4, atol=2e-5)
    assert np.allclose(outputs_of(model), fresh, **near)
    trained(model)
    for path, kernel in kernels(model).items():
        if path in base_format.formats(model) and name != "SHiRA":
            assert np.array_equal(kernel, rounded[path]), path
    adapted = outputs_of(model)
    assert np.abs(adapted - fresh).max() > 1e-3
    report = keras_peft.merge(model)
    assert not base_format.formats(model)
    assert np.allclose(outputs_of(model), adapted, **near)
    # NormalFloat4 misses 9 % of a normal kernel, 8 bits less than 1 %.
    low, high = (0.003, 0.02) if base == "int8" else (0.05, 0.15)
    assert len(report.base_errors) == 5
    assert all(low < e < high for e in report.base_errors.values())
    keras_peft.unmerge(model)
    assert np.array_equal(outputs_of(model), adapted)


@pytest.mark.slice
def test_a_merged_model_is_a_plain_one(tmp_path):
    model = tiny()
    names = [(v.path, v.shape, v.dtype, v.trainable) for v in model.weights]
    keras_peft.adapt(model, METHODS["LoRA"], base="nf4")
    trained(model)
    keras_peft.merge(model)
    now = [(v.path, v.shape, v.dtype, v.trainable) for v in model.weights]
    assert now == names
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert np.array_equal(outputs_of(loaded), outputs_of(model))
    trained(loaded)


@pytest.mark.slice
@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
def test_saved_and_loaded_computes_the_same(tmp_path, init):
    model, weights = tiny(), tiny().get_weights()
    model.set_weights(weights)
    method = keras_peft.LoRA(rank=4, init=init, decompose=True)
    keras_peft.adapt(model, method, base="nf4")
    trained(model)
    expected = outputs_of(model)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert base_format.formats(loaded) == base_format.formats(model)
    assert np.array_equal(outputs_of(loaded), expected)
    other = tiny()
    other.set_weights(weights)
    keras_peft.load_adapter(other, tmp_path / "adapter", trainable=True)
    assert np.array_equal(outputs_of(other), expected)
    trained(other)
    other.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(outputs_of(other), expected)


def test_an_adapter_of_a_rounded_base_fits_the_base_as_it_was(tmp_path):
    model, weights = tiny(), tiny().get_weights()
    model.set_weights(weights)
    keras_peft.adapt(model, METHODS["LoRA"], base="nf4")
    trained(model)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter.json").read_text())
    found = [e for e in settings["base"].values() if e.get("format") == "nf4"]
    assert len(found) == 5
    exact = tiny()
    exact.set_weights(weights)
    keras_peft.load_adapter(exact, tmp_path / "adapter", base=None)
    assert not base_format.formats(exact)
    assert kernels(exact)["backbone.dense"].tobytes() == weights[0].tobytes()
    with pytest.raises(ValueError, match="trained over a base in nf4"):
        keras_peft.load_adapter(exact, tmp_path / "adapter", "second")
    other = tiny()
    with pytest.raises(ValueError, match="other values"):
        keras_peft.load_adapter(other, tmp_path / "adapter")
    assert not base_format.formats(other)


def test_loftq_starts_nearer_to_the_base_than_rounding():
    errors = {}
    model, weights = tiny(), tiny().get_weights()
    model.set_weights(weights)
    expected = outputs_of(model)
    for init in ("default", "loftq"):
        model = tiny()
        model.set_weights(weights)
        keras_peft.adapt(model, keras_peft.LoRA(16, init=init), base="nf4")
        errors[init] = np.linalg.norm(outputs_of(model) - expected)
    # The 16 largest of 64 singular values of noise hold half of its squares.
    assert errors["loftq"] < 0.85 * errors["default"]


@pytest.mark.slice
def test_a_model_loads_into_four_bits(tmp_path):
    model = tiny()
    keras_peft.adapt(model, METHODS["LoRA"], base="nf4")
    rounded = kernels(model)
    keras_peft.remove(model)
    exact = tiny()
    exact.save_weights(tmp_path / "exact.weights.h5")
    with keras_peft.quantized_base("nf4"):
        inside = tiny()
        assert set(base_format.formats(inside)) == set(rounded) - {
            "backbone.dense_3",
            "logits",
        }
        inside.load_weights(tmp_path / "exact.weights.h5")
    expected = tiny()
    expected.load_weights(tmp_path / "exact.weights.h5")
    keras_peft.adapt(expected, METHODS["LoRA"], base="nf4")
    keras_peft.adapt(inside, METHODS["LoRA"])
    for path, kernel in kernels(expected).items():
        assert np.array_equal(kernels(inside)[path], kernel), path
    trained(inside)
    assert not base_format.formats(tiny())


def test_removing_leaves_the_rounded_base(tmp_path):
    model = tiny()
    keras_peft.adapt(model, METHODS["LoRA"], base="nf4")
    fresh = outputs_of(model)
    trained(model)
    keras_peft.remove(model)
    assert np.allclose(outputs_of(model), fresh, atol=1e-6)
    keras_peft.adapt(model, METHODS["DoRA"])
    assert np.allclose(outputs_of(model), fresh, atol=1e-5)
    with pytest.raises(ValueError, match="in nf4"):
        keras_peft.remove(model).save(tmp_path / "never.keras")


def test_no_kernel_and_no_gradient_of_one_is_kept():
    """What is kept for the backward pass has no size of a kernel."""
    if keras.config.backend() != "torch":
        pytest.skip("torch shows what it keeps")
    import torch

    model = tiny()
    keras_peft.adapt(model, METHODS["DoRA"], base="nf4")
    sizes = []

    def pack(tensor):
        sizes.append((tuple(tensor.shape), tensor.is_floating_point()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(data()[0])
    kernels_of = {
        tuple(layer.kernel.shape)
        for path, layer in layer_tree.walk(model)
        if path in base_format.formats(model)
    }
    flat = {(s[0], int(np.prod(s[1:]))) for s in kernels_of} | {(128, 64)}
    flat |= {shape[::-1] for shape in flat}
    kept = [shape for shape, is_float in sizes if is_float]
    assert kept
    assert not [shape for shape in kept if shape in kernels_of | flat]


def test_summary_says_how_a_model_trains():
    import keras_hub
    from backbones import BACKBONES

    backbone = BACKBONES["llama"].build(hidden_dim=64, num_query_heads=1)
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    keras_peft.adapt(model, METHODS["LoRA"], base="int8")
    keras_peft.training.prepare(model, remat="full", packing=True)
    text = summary_of(model)
    assert f"Base: kernels of {len(base_format.formats(model))} layers" in text
    assert "Training: loss in chunks of 1024 tokens\n" in text
    assert "computed again in the backward pass ('full'), 2 layers" in text
    assert "sequences of a row kept apart" in text
    keras_peft.training.restore(model)
    assert "Training" not in summary_of(model)


class TestErrors:
    def test_export_of_what_cannot_be_merged(self, tmp_path):
        model = tiny()
        keras_peft.adapt(model, METHODS["LoRA"], base="nf4")
        keras_peft.remove(model)
        with pytest.raises(ValueError, match="The base is in nf4"):
            keras_peft.export.to_onnx(model, tmp_path / "exported")
        assert not (tmp_path / "exported").exists()

    def test_unknown_format(self):
        with pytest.raises(ValueError, match="`base` must be one of 'nf4'"):
            keras_peft.adapt(tiny(), METHODS["LoRA"], base="fp4")
        with pytest.raises(ValueError, match="`base` must be one of 'nf4'"):
            with keras_peft.quantized_base("fp4"):
                pass

    def test_nothing_to_round(self):
        model = keras.Sequential([keras.Input((8,)), k.Dense(8), k.Dense(2)])
        before = [w.tobytes() for w in model.get_weights()]
        with pytest.raises(ValueError, match="no kernel to quantize"):
            keras_peft.adapt(model, METHODS["LoRA"], base="nf4")
        assert [w.tobytes() for w in model.get_weights()] == before

    def test_another_format_than_it_has(self):
        model = keras_peft.adapt(tiny(), METHODS["LoRA"], base="nf4")
        with pytest.raises(ValueError, match="in nf4 already"):
            keras_peft.adapt(model, METHODS["LoRA"], name="b", base="int8")
        keras_peft.adapt(model, METHODS["LoRA"], name="b", base="nf4")

    def test_a_head_that_was_loaded_in_four_bits(self):
        with keras_peft.quantized_base("nf4"):
            model = tiny()
        with pytest.raises(ValueError, match="The head trains"):
            keras_peft.adapt(
                model, METHODS["LoRA"], "dense", head=["backbone.dense_1"]
            )

    def test_loftq_where_the_kernels_are_gone(self):
        with keras_peft.quantized_base("nf4"):
            model = tiny()
        fresh = outputs_of(model)
        with pytest.raises(ValueError, match="what rounding the base lost"):
            keras_peft.adapt(model, keras_peft.LoRA(4, init="loftq"))
        assert not adapter_state.is_adapted(model)
        assert np.array_equal(outputs_of(model), fresh)

    def test_two_roundings(self):
        with pytest.raises(ValueError, match="Choose one of the two"):
            keras_peft.adapt(
                tiny(),
                METHODS["LoRA"],
                base="nf4",
                quantize_aware="int4",
                calibration=data()[0],
            )

    def test_a_failure_brings_the_kernels_back(self):
        model = tiny()
        before = [w.tobytes() for w in model.get_weights()]
        with pytest.raises(ValueError, match="rank"):
            method = keras_peft.LoRA(4, rank_pattern={"dense$": 10**6})
            keras_peft.adapt(model, method, base="nf4")
        assert [w.tobytes() for w in model.get_weights()] == before
        keras_peft.adapt(model, METHODS["LoRA"])
