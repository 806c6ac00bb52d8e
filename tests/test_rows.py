"""Laws of a batch whose rows go through adapters of their own."""

import keras
import numpy as np
import pytest
from models import build
from models import data
from models import fit
from models import outputs
from table import METHODS
from table import randomize

import keras_peft
from keras_peft import adapter_state
from keras_peft.methods.adapter import KernelAdapter

NAME = "bert-classifier"
ROWS = ["a", "b", None, "b", "a", "a", None, "b"]
METHOD_ROWS = [
    pytest.param(row, id=name, marks=[pytest.mark.slice] * row.slice)
    for name, row in METHODS.items()
    if row.models
]


def two_adapters(method=None, name=NAME):
    """Adapters "a" and "b", and one head that all share."""
    model = build(name)
    targets = ["embeddings", "all-linear"] if name == "subclassed" else None
    keras_peft.adapt(model, keras_peft.LoRA(2, alpha=3), targets, "a")
    keras_peft.adapt(model, method or keras_peft.LoRA(3), targets, "b")
    for each in "ab":
        randomize(model, each, 0.3)
        model.peft.adapters[each].trainable = False
    keras_peft.set_adapter(model, "a")
    return model


def compute(model, name=NAME):
    return keras.ops.convert_to_numpy(model(data(name)[0], training=False))


def alone(model, rows, name=NAME):
    """Each row from a run of the whole batch with its adapter alone."""
    found = {}
    for each in dict.fromkeys(rows):
        keras_peft.set_adapter(model, each)
        found[each] = compute(model, name)
    keras_peft.set_adapter(model, "a")
    return np.stack([found[each][i] for i, each in enumerate(rows)])


@pytest.mark.parametrize("row", METHOD_ROWS)
def test_each_row_is_a_run_with_its_adapter_alone(row):
    name = row.models[0]
    model = two_adapters(row.make(), name)
    leaves = adapter_state.leaves(model, "b").values()
    if not all(isinstance(leaf, KernelAdapter) for leaf in leaves):
        with pytest.raises(ValueError, match="more than change kernels"):
            with keras_peft.adapter_names(model, ROWS):
                pass
        return
    expected = alone(model, ROWS, name)
    before = compute(model, name)
    with keras_peft.adapter_names(model, ROWS) as divided:
        found = compute(divided, name)
    # What the other adapters add is multiplied by zero.
    assert np.array_equal(found, expected)
    assert np.array_equal(compute(model, name), before)


@pytest.mark.slice
@pytest.mark.parametrize("name", ["functional", "convolutional", "subclassed"])
def test_rows_are_told_apart_in_every_kind_of_layer(name):
    model = two_adapters(name=name)
    expected = alone(model, ROWS, name)
    with keras_peft.adapter_names(model, ROWS):
        assert np.array_equal(compute(model, name), expected)
    assert len(np.unique(expected, axis=0)) == len(ROWS)


@pytest.mark.slice
def test_compiled_functions_follow_the_rows():
    model = two_adapters(name="functional")
    inputs = data("functional")[0]
    model.compile("sgd", "mse")
    others = ROWS[::-1]
    before = model.predict_on_batch(inputs)
    for rows in (ROWS, others):
        expected = alone(model, rows, "functional")
        with keras_peft.adapter_names(model, rows):
            found = model.predict_on_batch(inputs)
        # Compiled in another order than the runs alone: sums of five terms.
        limit = 3 * 5 * 2.0**-23 * np.abs(expected).max()
        assert np.abs(found - expected).max() <= limit
    assert np.array_equal(model.predict_on_batch(inputs), before)


@pytest.mark.slice
def test_the_model_is_as_before_even_after_an_error():
    model = two_adapters()
    keras_peft.set_adapter(model, {"b": 0.5, "a": 2.0})
    before = outputs(model, NAME)
    with pytest.raises(KeyError), keras_peft.adapter_names(model, ROWS):
        raise KeyError
    assert model.peft.active == {"b": 0.5, "a": 2.0}
    assert np.array_equal(outputs(model, NAME), before)


@pytest.mark.slice
def test_training_continues_after_the_block():
    model = build("functional")
    keras_peft.adapt(model, keras_peft.LoRA(2), name="a")
    losses = fit(model, "functional", epochs=2)
    optimizer = model.optimizer
    with keras_peft.adapter_names(model, ["a"] * 8):
        compute(model, "functional")
        with pytest.raises(ValueError, match="are for inference"):
            model.train_on_batch(*data("functional"))
    assert model.optimizer is optimizer
    inputs, targets = data("functional")
    more = model.fit(inputs, targets, epochs=2, verbose=0).history["loss"]
    assert more[-1] < losses[0]


@pytest.mark.slice
def test_a_batch_of_another_size_is_refused():
    model = two_adapters()
    for rows in (ROWS[:1], ROWS[:7], ROWS * 2):
        with keras_peft.adapter_names(model, rows):
            with pytest.raises(ValueError, match=f"named {len(rows)} rows"):
                compute(model)


@pytest.mark.slice
def test_what_cannot_be_told_apart_is_refused():
    model = two_adapters()
    for rows, words in (
        ([], "for each row of the batch"),
        (["a", "c"], "no adapter of that name"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            with keras_peft.adapter_names(model, rows):
                pass
        assert "Received: " in str(caught.value)
    for variable in adapter_state.head_variables(model).values():
        variable.assign(variable + 1.0)
    with pytest.raises(ValueError, match="heads of their own: 'a' and 'b'"):
        with keras_peft.adapter_names(model, ["a", "b"]):
            pass
    with keras_peft.adapter_names(model, ["a", "a"]):
        pass
    keras_peft.merge(model)
    with pytest.raises(ValueError, match="has no adapters"):
        with keras_peft.adapter_names(model, ["a"]):
            pass


CHANGES = {
    "set": lambda model: keras_peft.set_adapter(model, "b"),
    "remove": keras_peft.remove,
    "merge": keras_peft.merge,
    "adapt": lambda model: keras_peft.adapt(model, keras_peft.LoRA(2)),
    "disable": lambda model: keras_peft.disabled(model).__enter__(),
    "nest": lambda model: keras_peft.adapter_names(model, ROWS).__enter__(),
}


@pytest.mark.slice
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_else_changes_within_the_block(change):
    model = two_adapters()
    before = outputs(model, NAME)
    with keras_peft.adapter_names(model, ROWS):
        inside = compute(model)
        with pytest.raises(ValueError, match="Received: "):
            change(model)
        assert np.array_equal(compute(model), inside)
    assert list(model.peft.adapters) == ["a", "b"]
    assert np.array_equal(outputs(model, NAME), before)
