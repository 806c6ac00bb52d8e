"""Laws of batches of similar length: all tokens, and few shapes."""

import itertools

import keras
import numpy as np
import pytest
from models import build

from keras_peft import training

pytestmark = pytest.mark.slice


def sequences(count=203, longest=90, vocabulary=1000):
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(0.05, count) + 1, longest)
    return [rng.integers(1, vocabulary, n).tolist() for n in lengths]


def epochs(batches, count=4):
    for _ in range(count):
        yield [batches[index] for index in range(len(batches))]
        batches.on_epoch_end()


def tokens_of(batch):
    """Each sequence of a batch, as it was given."""
    x, y, sample_weight = batch
    assert x["token_ids"].shape == y.shape == sample_weight.shape
    for row, mask, targets, weights in zip(
        x["token_ids"], x["padding_mask"], y, sample_weight, strict=True
    ):
        length = mask.sum()
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert targets[: length - 1].tolist() == row[1:length].tolist()
        assert weights.tolist() == [1] * (length - 1) + [0] * (
            len(mask) - length + 1
        )
        assert not row[length:].any()
        yield tuple(row[:length].tolist())


SIZES = [
    {"batch_size": 8},
    {"tokens_per_batch": 200},
    {"batch_size": 8, "boundaries": [16, 32, 64, 90]},
    {"tokens_per_batch": 50, "shuffle": False},
    {"batch_size": 500},
]


@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_an_epoch_has_every_sequence_once_in_few_shapes(settings):
    given = sequences()
    batches = training.LengthBuckets(given, **settings)
    shapes = set()
    for epoch in epochs(batches):
        found = [each for batch in epoch for each in tokens_of(batch)]
        assert sorted(found) == sorted(map(tuple, given))
        shapes |= {batch[1].shape for batch in epoch}
    assert len(shapes) <= len(batches.boundaries) + 1
    assert {length for _, length in shapes} <= set(batches.boundaries)
    for rows, length in shapes:
        assert rows <= settings.get("batch_size", rows)
        assert rows == 1 or rows * length <= settings.get(
            "tokens_per_batch", rows * length
        )


def test_epochs_differ_and_a_seed_repeats_them():
    def read(seed, shuffle=True):
        batches = training.LengthBuckets(
            sequences(), batch_size=8, seed=seed, shuffle=shuffle
        )
        return [
            [list(tokens_of(batch)) for batch in epoch]
            for epoch in epochs(batches, 2)
        ]

    first, second = read(seed=1)
    assert first != second
    assert read(seed=1) == [first, second]
    assert read(seed=2)[0] != first
    unmoved, again = read(seed=1, shuffle=False)
    assert unmoved == again


def test_little_of_the_batches_is_padding():
    given = sequences(2000)
    tokens = sum(map(len, given))
    batches = training.LengthBuckets(given, batch_size=8)
    (epoch,) = epochs(batches, 1)
    share = 1 - tokens / sum(y.size for _, y, _ in epoch)
    whole = 1 - tokens / (2000 * max(map(len, given)))
    # Rounding to 8 adds 3.5 tokens on average, to sequences of 20.
    assert share < 0.2 and whole > 0.75


def test_no_other_boundaries_need_less_padding():
    lengths = [3, 9, 9, 17, 30, 31, 90]
    given = [[1] * length for length in lengths]

    def tokens(boundaries):
        return sum(min(b for b in boundaries if b >= n) for n in lengths)

    batches = training.LengthBuckets(given, batch_size=1)
    assert batches.boundaries == [8, 16, 24, 32, 96]
    given += [[1] * length for length in range(40, 80)]
    lengths += range(40, 80)
    found = training.LengthBuckets(given, batch_size=1).boundaries
    multiples = range(8, 96, 8)
    least = min(
        tokens([*chosen, 96]) for chosen in itertools.combinations(multiples, 7)
    )
    assert len(found) == 8 and tokens(found) == least


def test_weights_are_those_of_the_next_token():
    batches = training.LengthBuckets(
        [[1, 2, 3], [4, 5]], 2, weights=[[9, 0, 0.5], [9, 2]], shuffle=False
    )
    ((_, _, sample_weight),) = [batches[i] for i in range(len(batches))]
    assert sample_weight[:, :3].tolist() == [[0, 0.5, 0], [2, 0, 0]]


# TensorFlow takes for fixed what the first two batches have in common.
@pytest.mark.parametrize("shuffle", [True, False])
def test_models_fit_on_batches_of_several_lengths(shuffle):
    given = sequences(30, longest=8, vocabulary=20)
    batches = training.LengthBuckets(
        given, batch_size=4, boundaries=[2, 5, 8], shuffle=shuffle
    )
    model = training.prepare(build("gpt2"), chunk_size=7)
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(
            True, reduction="mean_with_sample_weight"
        ),
    )
    losses = keras.Model.fit(model, batches, epochs=3, verbose=0)
    assert losses.history["loss"][-1] < losses.history["loss"][0]
    loss = keras.Model.evaluate(model, batches, verbose=0, return_dict=True)
    assert loss["loss"] < losses.history["loss"][0]


BAD = {
    "no size": ({}, "batch_size=None"),
    "two sizes": ({"batch_size": 2, "tokens_per_batch": 9}, "batch_size=2"),
    "no rows": ({"batch_size": 0}, "batch_size=0"),
    "too short": ({"batch_size": 2, "boundaries": [2]}, "up to 3 tokens"),
    "descending": ({"batch_size": 2, "boundaries": [9, 4]}, "[9, 4]"),
    "no boundaries": ({"batch_size": 2, "boundaries": []}, "boundaries=[]"),
    "weights": ({"batch_size": 2, "weights": [[1]]}, "1 tokens in 1 lists"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    settings, said = BAD[name]
    with pytest.raises(ValueError) as caught:
        training.LengthBuckets([[1, 2, 3], [4]], **settings)
    assert said in str(caught.value) and "Received: " in str(caught.value)
