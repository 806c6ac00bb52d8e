"""Laws of computing blocks again: same numbers, less kept."""

import keras
import numpy as np
import pytest
from models import MODELS
from models import build
from models import data
from models import fit
from models import kept_on_jax
from models import same_bits
from models import values

import keras_peft
from keras_peft import layer_tree
from keras_peft import training

BACKEND = keras.config.backend()
POLICIES = ["full"] if BACKEND == "tensorflow" else ["full", "dots"]


def model_with_dropout(name, of_adapters=0.2):
    keras.utils.set_random_seed(1)
    model = MODELS[name](dropout=0.3)
    return keras_peft.adapt(model, keras_peft.LoRA(2, dropout=of_adapters))


def losses(model, name):
    # Torch draws from a generator of its own, which no variable holds.
    keras.utils.set_random_seed(1)
    return fit(model, name, optimizer=keras.optimizers.SGD(0.1))


@pytest.mark.slice
@pytest.mark.parametrize("policy", POLICIES)
def test_it_trains_as_before_dropout_included(policy):
    found, expected = (model_with_dropout("llama") for _ in range(2))
    training.rematerialize(found, policy)
    # Float32: the same operations, which a compiler may fuse otherwise.
    ours, theirs = (losses(model, "llama") for model in (found, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    after, before = (values(m.trainable_variables) for m in (found, expected))
    for ours, theirs in zip(after.values(), before.values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_every_kind_of_block_trains_as_before(name):
    found, expected = (model_with_dropout(name) for _ in range(2))
    training.rematerialize(found)
    ours, theirs = (losses(model, name) for model in (found, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# -- What is kept ------------------------------------------------------------


@pytest.mark.slice
@pytest.mark.skipif(
    BACKEND != "jax", reason="others do not tell what they keep"
)
def test_less_is_kept():
    inputs = data("llama")[0]
    kept = {}
    for policy in (None, "dots", "full"):
        model = model_with_dropout("llama")
        if policy is not None:
            training.rematerialize(model, policy)
        kept[policy] = kept_on_jax(model, inputs)
    assert kept["full"] < kept["dots"] < kept[None]


def products_on_torch(model, inputs):
    """How many matrix products a step takes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    count = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal count
            count += function.__name__.split(".")[0] in ("mm", "addmm", "bmm")
            return function(*args, **(kwargs or {}))

    with Watch():
        keras.ops.mean(model(inputs, training=True)).backward()
    return count


@pytest.mark.slice
@pytest.mark.skipif(BACKEND != "torch", reason="torch counts its products")
def test_what_was_not_kept_is_computed_again():
    inputs = data("llama")[0]
    counts = {}
    for policy in (None, "dots", "full"):
        model = model_with_dropout("llama")
        if policy is not None:
            training.rematerialize(model, policy)
        counts[policy] = products_on_torch(model, inputs)
    # An attention in one operator is not counted, and computed again by both.
    assert counts[None] <= counts["dots"] < counts["full"]


# -- All else ----------------------------------------------------------------


@pytest.mark.slice
def test_calls_and_files_are_as_before(tmp_path):
    model = build("bert-classifier")
    inputs = data("bert-classifier")[0]
    before = model.predict(inputs, verbose=0)
    config = keras.saving.serialize_keras_object(model)
    training.rematerialize(model)
    assert model.predict(inputs, verbose=0).tobytes() == before.tobytes()
    assert keras.saving.serialize_keras_object(model) == config
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    layers = layer_tree.layers_by_path(loaded).values()
    assert not any(layer_tree.restore_methods(layer) for layer in layers)
    assert same_bits(values(loaded.variables), values(model.variables))


def test_adapters_come_and_go():
    model = build("llama")
    training.rematerialize(model)
    keras_peft.adapt(model, keras_peft.BottleneckAdapter(2))
    first, last = fit(model, "llama")
    assert last < first
    keras_peft.remove(model)
    first, last = fit(model, "llama")
    assert last < first


def test_restore_leaves_nothing():
    model = build("llama")
    layers = layer_tree.layers_by_path(model).values()
    attributes = [set(vars(layer)) for layer in layers]
    training.rematerialize(model)
    assert [set(vars(layer)) for layer in layers] != attributes
    training.restore(model)
    assert [set(vars(layer)) for layer in layers] == attributes


@pytest.mark.parametrize("policy", ["everything", "dots"])
def test_unknown_policies_are_refused(policy):
    if policy in POLICIES:
        pytest.skip("a policy of this backend")
    with pytest.raises(ValueError, match="policy="):
        training.rematerialize(build("llama"), policy)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no transformer blocks"):
        training.rematerialize(build("functional"))


# -- In one call -------------------------------------------------------------


def test_prepare_puts_on_what_was_asked_for():
    # Adapters without dropout: prepared, some drop the same inputs.
    found, expected = (model_with_dropout("llama", 0) for _ in range(2))
    training.prepare(found, remat="full", chunk_size=5)
    ours, theirs = (losses(model, "llama") for model in (found, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    training.prepare(found, loss=None, remat="full")
    # JAX compiles the step of any prepared model.
    compiled = {"make_train_function"} if BACKEND == "jax" else set()
    assert layer_tree.restore_methods(found) == compiled
    training.restore(found)
    layers = layer_tree.layers_by_path(found).values()
    assert not any(layer_tree.restore_methods(layer) for layer in layers)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"loss": "mse"}, "loss="),
        ({"remat": "some"}, "policy="),
        ({"chunk_size": 0}, "chunk_size="),
        ({"attention": "flash"}, "attention="),
    ],
)
def test_prepare_refuses_before_it_changes_anything(settings, said):
    model = build("llama")
    training.prepare(model, remat="full")
    before = vars(model)["train_step"]
    with pytest.raises(ValueError, match=said):
        training.prepare(model, **settings)
    assert vars(model)["train_step"] is before
