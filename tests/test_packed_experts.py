"""Laws of banks of experts in 4 or 8 bits."""

import keras
import numpy as np
import pytest
from backbones import inputs
from backbones import outputs

import keras_peft
from keras_peft import adapter_state
from keras_peft import base_format
from keras_peft import layer_tree
from keras_peft.quantized import FORMATS

SIZES = dict(
    vocabulary_size=20,
    num_layers=2,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=64,
    num_experts=2,
    top_k=2,
)
# Inputs of an expert's second matrix that fill no whole number of blocks.
WIDTH = 72
MOE = dict(
    intermediate_dim=WIDTH,
    moe_intermediate_dim=WIDTH,
    head_dim=32,
)
# Backbones, their settings, and how many kernels a bank has.
FAMILIES = {
    "mixtral": ("MixtralBackbone", dict(intermediate_dim=WIDTH), 3),
    "qwen-moe": (
        "QwenMoeBackbone",
        dict(
            intermediate_dim=WIDTH,
            moe_intermediate_dim=WIDTH,
            shared_expert_intermediate_dim=WIDTH,
        ),
        2,
    ),
    "qwen3-moe": ("Qwen3MoeBackbone", MOE, 2),
    "gpt-oss": ("GptOssBackbone", dict(intermediate_dim=WIDTH), 2),
}
METHOD = keras_peft.LoRA(rank=4)


def build(name, seed=0, **settings):
    import keras_hub

    kind, own, _ = FAMILIES[name]
    keras.utils.set_random_seed(seed)
    return getattr(keras_hub.models, kind)(**SIZES | own | settings)


def banks(model):
    """`{path.weight: array}` of what the experts compute with."""
    return {
        f"{path}.{variable.name}": keras.ops.convert_to_numpy(variable)
        for path, layer in layer_tree.walk(model)
        if "expert" in type(layer).__name__.lower()
        for variable in layer_tree.own_variables(layer)
        if len(variable.shape) == 3
    }


def trained(model, given):
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    targets = keras.ops.convert_to_numpy(model(given)) + 1.0
    keras.Model.fit(model, given, targets, epochs=2, verbose=0)
    return model


def rounded(kernel, base):
    """Blocks of 64 inputs of one expert each, the last filled up."""
    experts, rows, columns = kernel.shape
    filled = np.zeros((experts, -(-rows // 64) * 64, columns), "float32")
    filled[:, :rows] = kernel
    found = FORMATS[base].round(filled.reshape(-1, columns))
    return found.reshape(filled.shape)[:, :rows]


def cases():
    for name in FAMILIES:
        for base in FORMATS if name == "mixtral" else ["nf4"]:
            marks = [pytest.mark.slice] if base == "nf4" else []
            yield pytest.param(name, base, marks=marks, id=f"{name}-{base}")


# Float32 sums of 72 products, some layers deep.
NEAR = dict(rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "base"), cases())
def test_experts_are_rounded_train_and_merge(name, base):
    model = build(name)
    given = inputs(model)
    names = [(v.path, v.shape, v.dtype, v.trainable) for v in model.weights]
    before = banks(model)
    keras_peft.adapt(model, METHOD, base=base)
    after = banks(model)
    assert len(before) == 2 * FAMILIES[name][2]
    assert after.keys() == before.keys()
    for path, kernel in before.items():
        assert np.array_equal(after[path], rounded(kernel, base)), path
        assert not np.allclose(after[path], kernel, atol=1e-6)
    floats = [
        tuple(v.shape)
        for v in model.variables
        if v.dtype == "float32" and len(v.shape) == 3
    ]
    assert not {tuple(k.shape) for k in before.values()}.intersection(floats)
    fresh = outputs(model, given)
    trained(model, given)
    for path, kernel in banks(model).items():
        assert np.array_equal(kernel, after[path])
    adapted = outputs(model, given)
    assert np.abs(adapted - fresh).max() > 1e-3
    report = keras_peft.merge(model)
    assert not base_format.formats(model)
    now = [(v.path, v.shape, v.dtype, v.trainable) for v in model.weights]
    assert now == names
    low, high = (0.003, 0.02) if base == "int8" else (0.05, 0.15)
    assert before.keys() <= report.base_errors.keys()
    assert all(low < e < high for e in report.base_errors.values())
    assert np.allclose(outputs(model, given), adapted, **NEAR)
    keras_peft.unmerge(model)
    assert np.array_equal(outputs(model, given), adapted)
    keras_peft.remove(model)
    assert np.allclose(outputs(model, given), fresh, **NEAR)
    with pytest.raises(ValueError, match=f"in {base}"):
        layers = dict(layer_tree.walk(model))
        layers[next(iter(before)).rpartition(".")[0]].get_config()


@pytest.mark.slice
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_saved_and_loaded_computes_the_same(name, tmp_path):
    model = build(name)
    given = inputs(model)
    keras_peft.adapt(model, METHOD, base="nf4")
    trained(model, given)
    expected = outputs(model, given)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert base_format.formats(loaded) == base_format.formats(model)
    assert np.array_equal(outputs(loaded, given), expected)
    other = build(name)
    keras_peft.load_adapter(other, tmp_path / "adapter")
    assert np.array_equal(outputs(other, given), expected)
    wrong = build(name, seed=1)
    with pytest.raises(ValueError, match="other values"):
        keras_peft.load_adapter(wrong, tmp_path / "adapter")
    assert not base_format.formats(wrong)


@pytest.mark.slice
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_model_loads_into_four_bits(name, tmp_path):
    model = build(name)
    given = inputs(model)
    model.save_weights(tmp_path / "exact.weights.h5")
    keras_peft.adapt(model, METHOD, base="nf4")
    with keras_peft.quantized_base("nf4"):
        inside = build(name, seed=1)
    assert base_format.formats(inside) == base_format.formats(model)
    inside.load_weights(tmp_path / "exact.weights.h5")
    keras_peft.adapt(inside, METHOD)
    for path, kernel in banks(model).items():
        assert np.array_equal(banks(inside)[path], kernel), path
    assert np.array_equal(outputs(inside, given), outputs(model, given))
    assert not base_format.formats(build(name))


def test_no_bank_is_kept_for_the_backward_pass():
    if keras.config.backend() != "torch":
        pytest.skip("torch shows what it keeps")
    import torch

    model = build("mixtral")
    given = inputs(model)
    keras_peft.adapt(model, METHOD, base="nf4")
    sizes = []

    def pack(tensor):
        sizes.append((tensor.numel(), tensor.is_floating_point()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(given, training=True)
    kept = [size for size, is_float in sizes if is_float]
    assert kept and 2 * 64 * WIDTH not in kept


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_starts_in_the_kernel(init):
    errors = {}
    given = inputs(build("mixtral"))
    expected = outputs(build("mixtral"), given)
    for start in ("default", init):
        model = build("mixtral")
        method = keras_peft.LoRA(16, init=start)
        keras_peft.adapt(model, method, "mlp", base="nf4")
        errors[start] = np.linalg.norm(outputs(model, given) - expected)
    if init == "loftq":
        # The 16 largest of 64 singular values hold half of the squares.
        assert errors["loftq"] < 0.9 * errors["default"]
    else:
        assert np.isclose(errors["pissa"], errors["default"], rtol=1e-2)


class TestErrors:
    def test_a_failure_brings_the_kernels_back(self):
        model = build("mixtral")
        before = [w.tobytes() for w in model.get_weights()]
        method = keras_peft.LoRA(4, rank_pattern={"expert_bank": 10**6})
        with pytest.raises(ValueError, match="rank"):
            keras_peft.adapt(model, method, base="nf4")
        with keras_peft.quantized_base("nf4"):
            inside = build("mixtral")
        with pytest.raises(ValueError, match="what rounding the base lost"):
            keras_peft.adapt(inside, keras_peft.LoRA(4, init="loftq"))
        assert not adapter_state.is_adapted(inside)
        assert [w.tobytes() for w in model.get_weights()] == before
        keras_peft.adapt(model, METHOD, base="nf4")

    def test_banks_that_are_adapted_in_floating_point(self):
        model = keras_peft.adapt(build("mixtral"), METHOD)
        with pytest.raises(ValueError, match="over kernels in floating point"):
            keras_peft.adapt(model, METHOD, name="second", base="nf4")
        assert not base_format.formats(model)
