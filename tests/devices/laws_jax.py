"""Laws of `keras.distribution` on JAX, on four devices."""

import re

import jax
import keras
import keras_hub
import numpy as np
import pytest
from keras.distribution import DataParallel
from keras.distribution import DeviceMesh
from keras.distribution import LayoutMap
from keras.distribution import ModelParallel
from keras.src.backend.jax import trainer
from laws import adapted
from laws import assert_same_training
from laws import base_of
from laws import inputs_of
from laws import predicted
from laws import trained
from models import build
from models import data
from models import same_bits
from models import values

import keras_peft
from keras_peft import training
from keras_peft.replacing import replaced
from keras_peft.training import FullyShardedDataParallel


def model_parallel(own=()):
    layout_map = LayoutMap(DeviceMesh((2, 2), ("batch", "model")))
    layout_map[".*(query|attention_output)/kernel"] = ("model", None, "batch")
    layout_map[".*feedforward_(gate|intermediate)_dense/kernel"] = (
        "batch",
        "model",
    )
    layout_map[".*feedforward_output_dense/kernel"] = ("model", None)
    layout_map.update(own)
    return ModelParallel(layout_map=layout_map, batch_dim_name="batch")


DISTRIBUTIONS = {
    "data": DataParallel,
    "model": model_parallel,
    "fully sharded": FullyShardedDataParallel,
}
every_distribution = pytest.mark.parametrize("kind", DISTRIBUTIONS)


@pytest.fixture(scope="module")
def on_one():
    model = adapted()
    return model, trained(model)


def axes_of(model):
    return {v.path: tuple(v.value.sharding.spec) for v in model.variables}


@every_distribution
def test_several_devices_train_as_one_does(kind, on_one, tmp_path):
    with DISTRIBUTIONS[kind]().scope():
        model = adapted()
        placed, before = axes_of(model), base_of(model)
        assert_same_training((model, trained(model)), on_one)
        assert same_bits(base_of(model), before)
        assert axes_of(model) == placed
        expected = predicted(model)
        keras_peft.save_adapter(model, tmp_path / "many")
        keras_peft.merge(model)
        # Float32 kernels of 16 terms, rounded once.
        merged = predicted(model)
        np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
        keras_peft.unmerge(model)
        assert same_bits(base_of(model), before)
        assert axes_of(model) == placed
    loaded = keras_peft.load_adapter(build("llama"), tmp_path / "many")
    found = predicted(loaded)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["model", "fully sharded"])
def test_an_adapter_of_one_device_loads_on_several(kind, on_one, tmp_path):
    keras_peft.save_adapter(on_one[0], tmp_path / "one")
    expected = predicted(on_one[0])
    with DISTRIBUTIONS[kind]().scope():
        model = keras_peft.load_adapter(build("llama"), tmp_path / "one")
        found = predicted(model)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        keras_peft.set_adapter(model, None)
        base = predicted(model)
    expected = predicted(build("llama"))
    np.testing.assert_allclose(base, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, is_adapted", [("model", True), ("fully sharded", False)]
)
def test_a_model_that_is_built_can_be_distributed(kind, is_adapted, on_one):
    model = adapted() if is_adapted else build("llama")
    with DISTRIBUTIONS[kind]().scope():
        training.distribute(model)
        if not is_adapted:
            keras.utils.set_random_seed(1)
            keras_peft.adapt(model, keras_peft.LoRA(2))
        assert axes_of(model) == axes_of(adapted())
        assert_same_training((model, trained(model)), on_one)


@pytest.mark.parametrize("kind", ["data", "fully sharded"])
def test_prepared_models_train_as_one_does(kind, on_one):
    with DISTRIBUTIONS[kind]().scope():
        model = training.prepare(adapted(), remat="full", chunk_size=5)
        assert_same_training((model, trained(model)), on_one)


def test_a_run_goes_on_when_its_model_is_distributed(on_one):
    model = adapted()
    adam = keras.optimizers.Adam(0.01)
    model.compile(adam, keras.losses.SparseCategoricalCrossentropy(True))
    arrays = inputs_of(), data("llama")[1]
    keras.Model.fit(model, *arrays, batch_size=4, verbose=0)
    before = values(model.trainable_variables)
    slots = values(adam.variables)
    with FullyShardedDataParallel().scope():
        training.distribute(model)
        assert same_bits(values(model.trainable_variables), before)
        assert same_bits(values(adam.variables), slots)
        keras.Model.fit(model, *arrays, batch_size=4, verbose=0)
    assert model.optimizer is adam


# -- Where things lie --------------------------------------------------------


def test_factors_follow_their_kernels():
    with model_parallel().scope():
        axes = axes_of(adapted())
    block = "transformer_layer_0/"
    for layer, a, b in (
        # "model" splits the heads or inner units, "batch" is the batch's.
        ("self_attention/query", ("model", None), (None, None)),
        ("self_attention/attention_output", ("model", None), (None, None)),
        ("feedforward_gate_dense", (None, None), (None, "model")),
        ("feedforward_output_dense", ("model", None), (None, None)),
        ("self_attention/key", (None, None), (None, None)),
    ):
        path = f"{block}{layer}/default/default/lora_kernel"
        assert (axes[path + "_a"], axes[path + "_b"]) == (a, b), layer


def test_a_layout_map_comes_first():
    own = {".*gate_dense/.*/lora_kernel_b": (None, "batch")}
    with model_parallel(own).scope():
        axes = axes_of(adapted())
    (found,) = {
        axes[path] for path in axes if re.fullmatch(next(iter(own)), path)
    }
    assert found == (None, "batch")


def test_layout_maps_of_keras_hub_serve():
    mesh = DeviceMesh((2, 2), ("batch", "model"))
    layout_map = keras_hub.models.GemmaBackbone.get_layout_map(mesh)
    with ModelParallel(layout_map=layout_map).scope():
        backbone = keras_hub.models.GemmaBackbone(
            vocabulary_size=20,
            num_layers=1,
            num_query_heads=2,
            num_key_value_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            head_dim=4,
        )
        model = keras_peft.adapt(backbone, keras_peft.LoRA(2))
        axes = axes_of(model)
        batch = {
            "token_ids": np.ones((4, 6), "int32"),
            "padding_mask": np.ones((4, 6), "int32"),
        }
        model.compile("adam", "mse")
        model.fit(batch, np.zeros((4, 6, 8), "float32"), verbose=0)
    # Kernels of a query are (heads, inputs, head size): `B` has the heads.
    query = "decoder_block_0/attention/query/default/default/lora_kernel"
    assert axes[query + "_a"] == (None, None)
    assert axes[query + "_b"] == (None, "model")


def test_other_methods_train_too():
    with FullyShardedDataParallel().scope():
        model = keras_peft.adapt(build("llama"), keras_peft.VeRA(rank=2))
        first, last = trained(model)
        assert last < first


def test_each_device_holds_its_part():
    with FullyShardedDataParallel().scope():
        model = adapted()
    for variable in model.variables:
        whole, parts = variable.value, variable.value.addressable_shards
        is_kernel = len(variable.shape) > 1 and "/default/" not in variable.path
        share = 4 if is_kernel else 1
        assert {part.data.size * share for part in parts} == {whole.size}


# -- What travels ------------------------------------------------------------


def compiled_step(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    arrays = inputs_of(), data("llama")[1]
    seen = []

    def jit(function, **kwargs):
        compiled = jax.jit(function, **kwargs)

        def run(*args):
            seen.append(compiled.lower(*args).compile().as_text())
            return compiled(*args)

        return run

    with replaced(trainer, jit=jit):
        keras.Model.fit(model, *arrays, batch_size=8, verbose=0)
    return seen[0]


def test_kernels_travel_and_activations_do_not():
    with FullyShardedDataParallel().scope():
        model = training.prepare(adapted(), remat="full", chunk_size=5)
        program = compiled_step(model)
    sizes = {tuple(v.shape) for v in model.variables}
    found = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", program)
    gathered = {tuple(map(int, shape.split(","))) for shape in found}
    assert gathered and gathered <= sizes
    assert "all-to-all" not in program


def test_without_a_distribution_it_says_so():
    with pytest.raises(ValueError, match="set_distribution"):
        training.distribute(build("llama"))
