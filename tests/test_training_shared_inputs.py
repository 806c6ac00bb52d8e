"""Laws of adapters that read inputs of several layers once."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import fit
from models import loss_on_jax
from models import summary_of
from models import values
from table import randomize
from test_encoder_decoders import adapted as encoder_decoder
from test_encoder_decoders import texts

import keras_peft
from keras_peft import layer_tree
from keras_peft import training
from keras_peft.training.shared_inputs import read_inputs_once

ops = keras.ops
BACKEND = keras.config.backend()
METHODS = {
    "lora": [keras_peft.LoRA(2)],
    "dora": [keras_peft.LoRA(2, decompose=True)],
    "pissa": [keras_peft.LoRA(2, init="pissa")],
    "ranks": [keras_peft.LoRA(2, rank_pattern={".*query.*": 3, ".*gate.*": 1})],
    "two": [keras_peft.LoRA(2), keras_peft.LoRA(3)],
    "beside-others": [keras_peft.LoRA(2), keras_peft.OFT(2)],
}


def adapted(name, methods):
    model = build(name)
    for number, method in enumerate(methods):
        keras_peft.adapt(model, method, "all-linear", name=f"a{number}")
        randomize(model, f"a{number}")
    keras_peft.set_adapter(model, [f"a{n}" for n in range(len(methods))])
    return model


def steps(model, name):
    return fit(model, name, optimizer=keras.optimizers.SGD(0.01))


def assert_trains_alike(found, expected, train):
    """To the rounding of float32 sums, whose order is another."""
    ours, theirs = train(found), train(expected)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    both = (values(m.trainable_variables).items() for m in (found, expected))
    # Not by paths, in which Keras numbers layers of two models on.
    for (path, after), (_, before) in zip(*both, strict=True):
        np.testing.assert_allclose(
            after, before, rtol=1e-4, atol=1e-5, err_msg=path
        )


@pytest.mark.slice
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_as_before(method):
    found, expected = (adapted("llama", METHODS[method]) for _ in range(2))
    read_inputs_once(found)
    assert_trains_alike(found, expected, lambda model: steps(model, "llama"))


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "vit", "mixtral"])
def test_every_kind_of_block_trains_as_before(name):
    found, expected = (adapted(name, METHODS["lora"]) for _ in range(2))
    read_inputs_once(found)
    assert_trains_alike(found, expected, lambda model: steps(model, name))


def test_layers_that_read_other_inputs_are_told_apart():
    """A query of a decoder, and keys and values of an encoder."""
    method = keras_peft.LoRA(2)
    found, expected = (encoder_decoder("bart", method) for _ in range(2))
    expected.set_weights(found.get_weights())
    inputs = texts()

    def train(model):
        loss = keras.losses.SparseCategoricalCrossentropy(True)
        model.compile(keras.optimizers.SGD(0.01), loss)
        arrays = inputs, inputs["decoder_token_ids"]
        found = keras.Model.fit(model, *arrays, epochs=2, verbose=0)
        return found.history["loss"]

    read_inputs_once(found)
    assert_trains_alike(found, expected, train)


@pytest.mark.slice
@pytest.mark.parametrize("remat", [None, "full"])
def test_it_is_a_part_of_prepare(remat):
    found, expected = (adapted("llama", METHODS["lora"]) for _ in range(2))
    training.prepare(found, remat=remat)
    assert "read once by their adapters" in summary_of(found)
    assert_trains_alike(found, expected, lambda model: steps(model, "llama"))
    training.restore(found)
    assert "read once by their adapters" not in summary_of(found)


def groups(model):
    """What is kept of shared inputs, group by group."""
    layers = layer_tree.layers_by_path(model).values()
    reads = [vars(layer).get("kernel_inputs") for layer in layers]
    found = [read.func.__self__ for read in reads if read is not None]
    return list({id(group): group for group in found}.values())


@pytest.mark.slice
def test_nothing_is_kept_alive():
    model = adapted("llama", METHODS["two"])
    read_inputs_once(model)
    found = groups(model)
    assert found
    steps(model, "llama")
    assert all(group.inputs is None for group in found)


def test_a_layer_that_lost_its_adapters_is_left_out():
    found, expected = (adapted("llama", METHODS["two"]) for _ in range(2))
    read_inputs_once(found)
    for model in (found, expected):
        keras_peft.remove(model, "a1")
    assert_trains_alike(found, expected, lambda model: steps(model, "llama"))
    keras_peft.merge(found)
    keras_peft.adapt(
        found, keras_peft.LoRA(2), targets=[".*query.*", ".*gate.*"]
    )
    first, last = fit(found, "llama")
    assert last < first


@pytest.mark.slice
def test_calling_the_model_is_not_touched():
    model = adapted("llama", METHODS["lora"])
    inputs = data("llama")[0]
    before = ops.convert_to_numpy(model(inputs))
    read_inputs_once(model)
    assert ops.convert_to_numpy(model(inputs)).tobytes() == before.tobytes()


@pytest.mark.slice
@pytest.mark.skipif(
    BACKEND == "torch", reason="draws from a generator of its own"
)
def test_adapters_that_share_inputs_drop_the_same():
    """One generator of each group moves on: that of its first adapter."""
    model = adapted("llama", [keras_peft.LoRA(2, dropout=0.5)])
    read_inputs_once(model)
    drops = {
        path: layer.adapters["a0"].dropout.seed_generator.state
        for path, layer in layer_tree.adapted_layers(model)
    }
    before = {path: ops.convert_to_numpy(v) for path, v in drops.items()}
    steps(model, "llama")
    moved = [
        path.rpartition(".")[2].lstrip("_")
        for path, state in drops.items()
        if not np.array_equal(ops.convert_to_numpy(state), before[path])
    ]
    blocks = 2
    alone = ["output_dense", "feedforward_output_dense"]
    first = ["query_dense", "feedforward_intermediate_dense"]
    assert sorted(moved) == sorted([*alone, *first] * blocks)


@pytest.mark.slice
@pytest.mark.skipif(BACKEND != "jax", reason="reads JAX's program")
def test_factors_lie_side_by_side():
    """Forward, and in both gradients: one product for three, and for two.

    The inputs of the first block have no gradient: two products are not there
    to be saved, and one more is computed beside that of the factors. Gates and
    what they gate also compute what adapters add with what they compute
    themselves.
    """

    def products(model):
        import jax

        loss, trainable = loss_on_jax(model, x)
        program = jax.jit(jax.grad(loss)).lower(trainable).as_text()
        return program.count("dot_general")

    x = data("llama")[0]
    model = adapted("llama", METHODS["lora"])
    before = products(model)
    read_inputs_once(model)
    blocks, saved, passes = 2, 2 + 1, 3
    joined = 2
    saved = blocks * (saved * passes + joined)
    assert products(model) == before - saved + 2 + 1


ASKING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__")


@pytest.mark.slice
@pytest.mark.skipif(BACKEND != "torch", reason="is about torch")
def test_no_number_is_asked_for():
    """Or steps on a GPU wait for it, and cannot be recorded."""
    from torch.overrides import TorchFunctionMode

    asked = []

    class Listening(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            asked.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    def asks(model):
        asked.clear()
        with Listening():
            model.train_on_batch(*data("llama"))
        return {name: asked.count(name) for name in ASKING}

    model = adapted("llama", METHODS["ranks"])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    model.train_on_batch(*data("llama"))
    before = asks(model)
    read_inputs_once(model)
    model.train_on_batch(*data("llama"))
    assert asks(model) == before
