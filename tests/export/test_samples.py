import keras
import model_table
import numpy as np
import pytest

from keras_peft.export import samples
from keras_peft.export.signature import read_signature


def made_up(model, **sizes):
    return samples.make_batch(model, read_signature(model), sizes, seed=0)


def test_ids_of_a_single_input_stay_within_its_table():
    ids = made_up(model_table.make("lstm"), batch=40, sequence=50)["ids"]
    assert ids.dtype == np.int32
    assert 40 < ids.max() < 50


def test_every_input_stays_within_its_own_table():
    batch = made_up(model_table.make("bert_classifier"), batch=9, sequence=60)
    assert set(np.unique(batch["segment_ids"])) == {0, 1}
    assert 900 < batch["token_ids"].max() < 1000


def test_masks_end_in_padding_on_every_row_but_the_first():
    batch = made_up(model_table.make("bert_classifier"), batch=4, sequence=9)
    mask = batch["padding_mask"]
    assert mask[0].all()
    assert not mask[1:, -1].any()
    assert mask[:, 0].all()
    assert (np.diff(mask, axis=1) <= 0).all()


def test_lengths_differ_where_the_model_lets_them():
    axes = read_signature(model_table.make("t5")).axes
    assert axes == ("batch", "decoder_sequence", "encoder_sequence")


def test_lengths_are_one_where_the_model_needs_one():
    assert read_signature(model_table.make("text_tower")).axes == (
        "batch",
        "sequence",
    )


@pytest.mark.parametrize("name", ["sequential", "lstm"])
def test_sizes_to_check_are_not_the_traced_ones(name):
    model = model_table.make(name)
    signature = read_signature(model)
    traced = samples.trace_sizes(model, signature)
    for sizes in samples.check_sizes(model, signature):
        assert all(sizes[axis] != traced[axis] for axis in signature.axes)
    assert min(traced.values()) > 1


def test_an_input_without_a_name_is_called_input():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    assert [i.name for i in read_signature(model).inputs] == ["input"]


@pytest.mark.parametrize("padding", [0, 1])
def test_sound_leaves_frames_after_convolutions_and_no_more_than_fit(padding):
    fitting = 16

    class Positions(keras.layers.Layer):
        sequence_length = fitting

        def call(self, inputs):
            return inputs

    sound = keras.Input((None, 1))
    x = keras.layers.ZeroPadding1D(padding)(sound)
    x = keras.layers.Conv1D(4, 127, strides=64)(x)
    x = keras.layers.Conv1D(4, 3, strides=2)(x)
    model = keras.Model(sound, Positions()(x))
    signature = read_signature(model)
    sizes = [
        samples.trace_sizes(model, signature),
        *samples.check_sizes(model, signature),
        samples.typical_sizes(model, signature),
    ]
    frames = [
        model.compute_output_shape((1, each["sequence"], 1))[1]
        for each in sizes
    ]
    assert all(1 < count <= fitting for count in frames)
    assert len(set(frames[:3])) == 3
