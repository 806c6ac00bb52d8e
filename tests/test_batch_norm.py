"""Batch normalization while a model is adapted: frozen, or part of the head."""

import keras
import models
import numpy as np
import pytest

import keras_peft
from keras_peft import adapter_state

numpy = keras.ops.convert_to_numpy
METHOD = keras_peft.LoRA(rank=2)
# A model without a head, and a task of keras-hub, which has one.
NAMES = ("convolutional", "resnet")


def _images(seed):
    """Images unlike those that the statistics are of."""
    rng = np.random.default_rng(seed)
    return rng.normal(2.0, 3.0, (8, 8, 8, 3)).astype("float32")


def _fit(model, seed=3):
    loss = keras.losses.SparseCategoricalCrossentropy(True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    labels = np.arange(8) % 3
    keras.Model.fit(model, _images(seed), labels, batch_size=8, verbose=0)


def _outputs(model):
    return numpy(model(models.data("convolutional")[0], training=False))


def _norms(model):
    """All scales, offsets and statistics; names differ from build to build."""
    return [
        numpy(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.variables
    ]


def _same(before, after):
    return [a.tobytes() for a in before] == [b.tobytes() for b in after]


def _trained(name, seed=3):
    model = models.build(name)
    keras_peft.adapt(model, METHOD, batch_norm="trained")
    _fit(model, seed)
    return model


@pytest.mark.slice
def test_by_default_fit_leaves_every_bit_of_it():
    model = keras_peft.adapt(models.build("convolutional"), METHOD)
    before = _norms(model)
    _fit(model)
    assert _same(before, _norms(model))


@pytest.mark.slice
@pytest.mark.parametrize("name", NAMES)
def test_trained_all_of_it_moves_and_the_rest_of_the_base_does_not(name):
    model = models.build(name)
    before = _norms(model)
    base = models.values(model.variables)
    keras_peft.adapt(model, METHOD, batch_norm="trained")
    assert _same(before, _norms(model))
    _fit(model)
    after = _norms(model)
    assert all((a != b).all() for a, b in zip(before, after, strict=True))
    head = adapter_state.head_variables(model).values()
    kept = base.keys() - {variable.path for variable in head}
    now = models.values(model.variables)
    assert kept and all((base[path] == now[path]).all() for path in kept)


@pytest.mark.slice
def test_the_base_comes_back_and_so_does_the_adapter():
    before = _norms(models.build("convolutional"))
    model = _trained("convolutional")
    after, adapted = _norms(model), _outputs(model)
    with keras_peft.disabled(model):
        assert _same(before, _norms(model))
    assert _same(after, _norms(model))
    keras_peft.merge(model)
    assert _same(after, _norms(model))
    # Sums of some hundred products, in another order through a few layers.
    error = np.abs(_outputs(model) - adapted).max()
    assert error <= 2.0**-23 * 256 * np.abs(adapted).max()
    keras_peft.unmerge(model)
    assert _same(after, _norms(model))
    assert np.array_equal(_outputs(model), adapted)
    keras_peft.remove(model)
    assert _same(before, _norms(model))
    plain = models.build("convolutional")
    assert len(model.trainable_variables) == len(plain.trainable_variables)
    _fit(model)
    assert not _same(before, _norms(model))


@pytest.mark.slice
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_file_holds_it(name, tmp_path):
    model = _trained(name)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    fresh = models.build(name)
    before = _norms(fresh)
    keras_peft.load_adapter(fresh, tmp_path / "adapter")
    assert np.array_equal(_outputs(fresh), _outputs(model))
    after = _norms(fresh)
    assert not _same(before, after)
    # What was loaded to be used keeps them, in training mode too.
    assert not fresh.trainable_variables
    fresh(_images(4), training=True)
    assert _same(after, _norms(fresh))
    keras_peft.remove(fresh)
    assert _same(before, _norms(fresh))


@pytest.mark.slice
def test_each_adapter_has_its_own():
    model = models.build("convolutional")
    seen = {None: _norms(model)}
    for seed, adapter in enumerate(("one", "two")):
        options = dict(batch_norm="trained") if seed == 0 else {}
        keras_peft.adapt(model, METHOD, name=adapter, **options)
        _fit(model, seed)
        seen[adapter] = _norms(model)
    assert not _same(seen["one"], seen["two"])
    for adapter in ("one", None, "two", "one"):
        keras_peft.set_adapter(model, adapter)
        assert _same(seen[adapter], _norms(model))


@pytest.mark.slice
# A task of keras-hub compiles itself: Keras warns of its fresh optimizer.
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_file_holds_the_bases_and_every_adapters(name, tmp_path):
    model = _trained(name)
    keras_peft.adapt(model, METHOD, name="two")
    _fit(model, seed=5)
    model.save(tmp_path / "model.keras")
    file = tmp_path / "model.keras"
    loaded = keras.saving.load_model(file, compile=False)
    for adapter in ("default", "two", None):
        for each in (model, loaded):
            keras_peft.set_adapter(each, adapter)
        assert np.array_equal(_outputs(model), _outputs(loaded))
        assert _same(_norms(model), _norms(loaded))


def _no_norms():
    return keras_peft.adapt(
        models.build("functional"), METHOD, batch_norm="trained"
    )


def _frozen_norms():
    model = models.build("convolutional")
    model.trainable = False
    return keras_peft.adapt(model, METHOD, batch_norm="trained")


def _targeted():
    model = models.build("convolutional")
    return keras_peft.adapt(
        model, keras_peft.NormTuning(), batch_norm="trained"
    )


def _second():
    model = keras_peft.adapt(models.build("convolutional"), METHOD)
    return keras_peft.adapt(model, METHOD, name="b", batch_norm="trained")


def _unknown():
    model = models.build("convolutional")
    return keras_peft.adapt(model, METHOD, batch_norm="train")


WRONG = {
    "none": (_no_norms, "whose base has trainable batch normalization"),
    "all frozen": (_frozen_norms, "whose base has trainable batch norm"),
    "adapted": (_targeted, "no adapter sits on"),
    "second adapter": (_second, "first adapter froze batch normalization"),
    "unknown": (_unknown, "must be 'frozen' or 'trained'"),
}


@pytest.mark.parametrize("make, words", WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
