"""Laws of a base that Keras quantized with GPTQ or AWQ."""

import keras
import numpy as np
import pytest
from models import draw_biases
from models import learn_classes

import keras_peft
from keras_peft import adapter_state
from keras_peft import keras_quantized
from keras_peft import layer_tree

k = keras.layers
to_numpy = keras.ops.convert_to_numpy
MODES = {
    "gptq-4": ("gptq", dict(weight_bits=4, group_size=16)),
    "gptq-8": ("gptq", dict(weight_bits=8, group_size=-1)),
    "gptq-3": ("gptq", dict(weight_bits=3, activation_order=True)),
    "awq": ("awq", dict(group_size=32, num_grid_points=4)),
}
METHODS = {
    "LoRA": keras_peft.LoRA(rank=4),
    "DoRA": keras_peft.LoRA(rank=4, decompose=True),
    "PiSSA": keras_peft.LoRA(rank=4, init="pissa"),
    "OFT": keras_peft.OFT(block_size=8),
    "IA3": keras_peft.IA3(),
    "SHiRA": keras_peft.SHiRA(rank=3),
}


def plain(dtype="float32"):
    """A classifier over kernels of every layout, none too thin for Keras."""
    inputs = keras.Input((6, 32))
    hidden = k.Dense(72, activation="gelu", dtype=dtype)(inputs)
    hidden = k.Dense(32, use_bias=False, dtype=dtype)(hidden)
    hidden = k.EinsumDense(
        "btd,dnh->btnh", (None, 2, 8), bias_axes="nh", dtype=dtype
    )(hidden)
    hidden = k.EinsumDense("btnh,nhd->btd", (None, 32), dtype=dtype)(hidden)
    block = keras.Model(inputs, hidden, name="block")
    inputs = keras.Input((6,), dtype="int32")
    hidden = k.Embedding(20, 32, name="embedding", dtype=dtype)(inputs)
    backbone = keras.Model(inputs, block(hidden), name="backbone")
    inputs = keras.Input((6,), dtype="int32")
    outputs = k.Dense(3, name="logits", dtype=dtype)(backbone(inputs))
    return draw_biases(keras.Model(inputs, outputs))


def quantized(name="gptq-4", dtype="float32"):
    mode, settings = MODES[name]
    model = plain(dtype)
    backbone = model.get_layer("backbone")
    kinds = {"gptq": keras.quantizers.GPTQConfig}
    kinds["awq"] = keras.quantizers.AWQConfig
    config = kinds[mode](
        dataset=[np.arange(20), np.arange(20)[::-1]],
        tokenizer=str.split,
        num_samples=2,
        sequence_length=6,
        quantization_layer_structure={
            "pre_block_layers": [backbone.get_layer("embedding")],
            "sequential_blocks": [backbone.get_layer("block")],
        },
        **settings,
    )
    model.quantize(mode, config=config, filters=_is_linear)
    # Keras would write the layers themselves into files.
    config.quantization_layer_structure = None
    return model


def loaded_again(model):
    """What Keras makes of a file with all that the layers hold.

    Keras 3.15.1 leaves the zeros out of its own files, and cannot load them.
    """
    other = keras.Model.from_config(model.get_config())
    layers = dict(layer_tree.walk(other))
    for path, layer in layer_tree.walk(model):
        if layer.quantization_mode is None:
            if not list(layer_tree.children(layer)):
                layers[path].set_weights(layer.get_weights())
            continue
        names = layer.variable_serialization_spec[layer.quantization_mode]
        held = [getattr(layer, name) for name in names]
        held = [to_numpy(v) for v in held if v is not None]
        layers[path].load_own_variables({str(i): v for i, v in enumerate(held)})
    return other


def _is_linear(layer):
    kinds = k.Dense, k.EinsumDense
    return isinstance(layer, kinds) and layer.name != "logits"


def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 20, (4, 6)), rng.integers(0, 3, (4, 6))


def trained(model, steps=3):
    return learn_classes(model, *data(), steps)


def outputs_of(model):
    outputs = model(data()[0])
    return to_numpy(keras.ops.cast(outputs, "float32"))


def integers(model):
    """`{path of a variable: bytes}` of what Keras quantized."""
    return {
        f"{path}.{variable.name}": to_numpy(variable).tobytes()
        for path, layer in layer_tree.walk(model)
        if path.startswith("backbone.block.")
        for variable in layer.non_trainable_variables
        if variable.dtype == "uint8" or "scale" in variable.name
    }


def described(model):
    """All that tells one plain Keras model from another but its values."""
    return [
        (variable.path, tuple(variable.shape), variable.dtype)
        for variable in model.weights
    ], [
        (path, type(layer), layer.dtype_policy.name, layer.quantization_mode)
        for path, layer in layer_tree.walk(model)
    ]


def cases():
    for name in METHODS:
        # What methods do is the same over every format.
        for mode in MODES if name == "LoRA" else ["gptq-4"]:
            is_sliced = (name, mode) == ("LoRA", "awq")
            marks = [pytest.mark.slice] if is_sliced else []
            yield pytest.param(name, mode, marks=marks, id=f"{name}-{mode}")


# Float32, sums of 72 products of about 1: 1e-6 of the largest.
NEAR = dict(rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "mode"), cases())
def test_fresh_is_the_base_and_merged_is_trained(name, mode):
    model = quantized(mode)
    base, whole, before = outputs_of(model), described(model), integers(model)
    assert len(before) >= 12
    keras_peft.adapt(model, METHODS[name], "all-linear")
    assert np.allclose(outputs_of(model), base, **NEAR)
    trained(model)
    assert integers(model) == before
    adapted = outputs_of(model)
    assert np.abs(adapted - base).max() > 1e-3
    report = keras_peft.merge(model)
    assert not report.base_errors
    assert set(report.dtypes.values()) == {"float32"}
    assert np.allclose(outputs_of(model), adapted, **NEAR)
    assert not any(la.quantization_mode for _, la in layer_tree.walk(model))
    keras_peft.unmerge(model)
    assert np.array_equal(outputs_of(model), adapted)
    assert integers(model) == before
    keras_peft.remove(model)
    assert described(model) == whole
    assert integers(model) == before
    # The head is back as well.
    assert np.array_equal(outputs_of(model), base)


@pytest.mark.parametrize(
    "mode", ["gptq-4", pytest.param("awq", marks=pytest.mark.slice)]
)
def test_a_merged_model_is_a_plain_one(mode, tmp_path):
    model = quantized(mode)
    keras_peft.adapt(model, METHODS["LoRA"])
    trained(model)
    keras_peft.merge(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    expected = plain()
    shapes = [(tuple(v.shape), v.dtype, v.trainable) for v in loaded.weights]
    assert shapes == [
        (tuple(v.shape), v.dtype, v.trainable) for v in expected.weights
    ]
    assert np.array_equal(outputs_of(loaded), outputs_of(model))
    trained(loaded)
    # Keras may quantize it anew.
    model.quantize("int8", filters=_is_linear)


@pytest.mark.parametrize(
    "mode", ["gptq-4", pytest.param("awq", marks=pytest.mark.slice)]
)
def test_saved_and_loaded_computes_the_same(mode, tmp_path):
    model = quantized(mode)
    other = loaded_again(model)
    base = outputs_of(model)
    assert np.array_equal(outputs_of(other), base)
    keras_peft.adapt(model, METHODS["DoRA"])
    trained(model)
    expected = outputs_of(model)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(outputs_of(loaded), expected)
    assert integers(loaded) == integers(model)
    keras_peft.remove(loaded)
    assert np.array_equal(outputs_of(loaded), base)
    keras_peft.load_adapter(other, tmp_path / "adapter", trainable=True)
    assert np.array_equal(outputs_of(other), expected)
    trained(other)
    other.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(outputs_of(other), expected)


def test_a_second_adapter_and_another_policy():
    model = quantized(dtype="mixed_bfloat16")
    base = outputs_of(model)
    keras_peft.adapt(model, METHODS["LoRA"])
    keras_peft.adapt(model, METHODS["IA3"], "all-linear", "second")
    # Bfloat16 sums in another order: 2**-8 of the largest, and a few layers.
    assert np.allclose(outputs_of(model), base, atol=0.05)
    trained(model)
    keras_peft.remove(model, "second")
    keras_peft.set_adapter(model, "default")
    keras_peft.merge(model)
    policies = {la.dtype_policy.name for _, la in layer_tree.walk(model)}
    assert "mixed_bfloat16" in policies
    assert not any("gptq" in policy for policy in policies)


def test_no_kernel_is_kept_for_the_backward_pass():
    if keras.config.backend() != "torch":
        pytest.skip("torch shows what it keeps")
    import torch

    model = quantized()
    keras_peft.adapt(model, METHODS["LoRA"], [r"block\.dense$"])
    sizes = []

    def pack(tensor):
        sizes.append((tensor.numel(), tensor.is_floating_point()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(data()[0])
    kernels = {
        int(np.prod(layer._kernel.shape))
        for _, layer in layer_tree.walk(model)
        if keras_quantized.is_taken(layer)
    }
    kept = [size for size, is_float in sizes if is_float]
    assert kernels == {32 * 72, 32 * 16} and kept
    assert not kernels.intersection(kept)


class TestErrors:
    def test_a_failure_leaves_the_model_as_it_was(self, tmp_path):
        model = quantized()
        base, whole = outputs_of(model), described(model)
        with pytest.raises(ValueError, match="No layer"):
            keras_peft.adapt(model, METHODS["LoRA"], "nothing")
        with pytest.raises(ValueError, match="in gptq already"):
            keras_peft.adapt(model, METHODS["LoRA"], base="nf4")
        with pytest.raises(ValueError, match="what rounding the base lost"):
            keras_peft.adapt(model, keras_peft.LoRA(4, init="loftq"))
        other = keras_peft.adapt(quantized("gptq-8"), METHODS["LoRA"])
        keras_peft.save_adapter(other, tmp_path / "adapter")
        with pytest.raises(ValueError, match="other values"):
            keras_peft.load_adapter(model, tmp_path / "adapter")
        assert not adapter_state.is_adapted(model)
        assert described(model) == whole
        assert np.array_equal(outputs_of(model), base)

    def test_two_roundings(self):
        with pytest.raises(ValueError, match="Choose one of the two"):
            keras_peft.adapt(
                quantized(),
                METHODS["LoRA"],
                quantize_aware="int4",
                calibration=data()[0],
            )

    def test_a_head_that_keras_quantized(self):
        with pytest.raises(ValueError, match="The head trains"):
            keras_peft.adapt(
                quantized(), METHODS["LoRA"], head=["backbone.block.dense"]
            )

    def test_what_was_not_calibrated(self):
        model = plain()
        config = keras.quantizers.GPTQConfig(None, None)
        layer = model.get_layer("backbone").get_layer("block").layers[1]
        layer.quantize("gptq", config=config)
        with pytest.raises(ValueError, match="gptq was not calibrated"):
            keras_peft.adapt(model, METHODS["LoRA"])
        assert not adapter_state.is_adapted(model)
