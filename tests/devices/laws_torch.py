"""Laws of data parallelism on torch, run by each of two processes."""

import keras
import numpy as np
import pytest
import torch
from laws import adapted
from laws import assert_same_training
from laws import base_of
from laws import inputs_of
from laws import trained
from models import build
from models import data
from models import fit
from models import outputs
from models import same_bits
from models import values
from torch import distributed

import keras_peft
from keras_peft import training

distributed.init_process_group("gloo")
RANK = distributed.get_rank()


@pytest.fixture
def folder(tmp_path):
    """The same folder in both processes."""
    folders = [str(tmp_path)]
    distributed.broadcast_object_list(folders)
    return folders[0] + "/adapter"


def both(value):
    """What either process has."""
    found = [None, None]
    distributed.all_gather_object(found, value)
    return found


def test_two_processes_train_as_one_does(folder):
    expected = adapted()
    expected_losses = trained(expected)
    model = training.data_parallel(adapted())
    before = base_of(model)
    assert_same_training((model, trained(model)), (expected, expected_losses))
    assert same_bits(base_of(model), before)
    assert same_bits(*both(values(model.trainable_variables)))
    keras_peft.save_adapter(model, folder)
    distributed.barrier()
    loaded = keras_peft.load_adapter(build("llama"), folder)
    assert outputs(loaded, "llama").tobytes() == (
        outputs(model, "llama").tobytes()
    )


def test_processes_start_from_the_first_ones_values():
    model = build("llama")
    keras.utils.set_random_seed(RANK)
    keras_peft.adapt(model, keras_peft.LoRA(2))
    assert not same_bits(*both(values(model.trainable_variables)))
    trained(training.data_parallel(model))
    assert same_bits(*both(values(model.trainable_variables)))


@pytest.mark.parametrize("settings", [{"chunk_size": 5}, {"remat": "full"}])
def test_prepared_models_train_as_one_does(settings):
    expected = adapted()
    expected_losses = trained(expected)
    model = adapted()
    training.prepare(model, **settings)
    training.data_parallel(model)
    assert_same_training((model, trained(model)), (expected, expected_losses))


@pytest.mark.parametrize("rows", [5, 7])  # The last batch has 1 or 3.
def test_rows_of_uneven_batches_count_alike(rows):
    some = {key: value[:rows] for key, value in inputs_of().items()}
    targets = data("llama")[1][:rows]

    def trained_on_some(model):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        settings = dict(epochs=2, batch_size=4, shuffle=False, verbose=0)
        validation = dict(validation_data=(some, targets))
        arrays = some, targets
        found = keras.Model.fit(model, *arrays, **settings, **validation)
        # One row alone is computed, and counted, by both.
        return model, found.history["val_loss"] if rows > 5 else []

    expected = trained_on_some(adapted())
    found = trained_on_some(training.data_parallel(adapted()))
    assert_same_training(found, expected)


def test_shuffled_data_and_metrics_are_shared():
    model = training.data_parallel(adapted())
    seen = []

    class See(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(logs["loss"]))

    keras.utils.set_random_seed(RANK)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    arrays = inputs_of(), data("llama")[1]
    settings = dict(batch_size=2, epochs=2, verbose=0)
    keras.Model.fit(model, *arrays, **settings, callbacks=[See()])
    assert len(seen) == 8
    ours, theirs = both(seen)
    assert ours == theirs
    ours, theirs = both(torch.rand(3).tolist())
    assert ours == theirs


def test_statistics_of_batch_normalization_are_the_same():
    model = build("convolutional")
    keras_peft.adapt(model, keras_peft.LoRA(2), batch_norm="trained")
    fit(training.data_parallel(model), "convolutional")
    assert same_bits(*both(values(model.variables)))


def test_one_process_writes_and_all_resume(folder):
    run = dict(callbacks=[keras_peft.AdapterCheckpoint(folder)])
    whole = training.data_parallel(adapted())
    expected = trained(whole)
    first = training.data_parallel(adapted())
    trained(first, epochs=1, **run)
    distributed.barrier()
    second = training.data_parallel(adapted())
    losses = trained(second, callbacks=[keras_peft.AdapterCheckpoint(folder)])
    np.testing.assert_allclose(losses, expected[1:], rtol=1e-6)
    assert same_bits(*both(values(second.trainable_variables)))


def test_restore_makes_it_one_process_again():
    model = training.data_parallel(adapted())
    trained(model)
    training.restore(model)
    if RANK == 0:  # The other one would be waited for.
        trained(model)


def test_a_sum_is_refused():
    model = training.data_parallel(adapted())
    loss = keras.losses.SparseCategoricalCrossentropy(True, reduction="sum")
    model.compile("sgd", loss)
    with pytest.raises(ValueError, match="reduction='sum'"):
        keras.Model.fit(model, inputs_of(), data("llama")[1], verbose=0)
