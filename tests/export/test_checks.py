"""What a float32 file is held to."""

import keras
import numpy as np
import pytest

from keras_peft.export import checks


def _power(exponent):
    inputs = keras.Input((4,))
    return keras.Model(inputs, inputs**exponent)


def _wave():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.ops.sin(inputs * 1e4))


def _table():
    inputs = keras.Input((4,), dtype="int32")
    return keras.Model(inputs, keras.layers.Embedding(7, 3)(inputs) ** 9.0)


# A change of x by a share e changes x**n by n e.
MODELS = {
    "identity": (lambda: _power(1.0), 1.0),
    "cube": (lambda: _power(3.0), 3.0),
    "tokens": (_table, 1.0),
    "wave": (_wave, 128.0),
}


def _prepared(make):
    keras.utils.set_random_seed(0)
    return checks.prepare_checks(make(), None)


@pytest.mark.slice
@pytest.mark.parametrize("make, wanted", MODELS.values(), ids=MODELS)
def test_magnification_is_that_of_changes_of_the_inputs(make, wanted):
    prepared = _prepared(make)
    found = prepared.magnification()
    # The change is 2**-16, and float32 rounds the outputs by 2**-24.
    assert abs(found - wanted) <= wanted * 2.0**-6


def _added(prepared, share):
    """What a file computes that is off by a share of the largest output."""

    references = iter(prepared.references)
    return lambda batch: [
        output + share * np.abs(output).max() for output in next(references)
    ]


@pytest.mark.slice
@pytest.mark.parametrize(
    "share, passes", [(0.5, True), (2.0, True), (4, False)]
)
def test_the_bound_grows_with_the_magnification(share, passes):
    prepared, bound = _prepared(lambda: _power(3.0)), 2.0**-10
    check = prepared.compare_exactly(_added(prepared, share * bound), bound)
    assert (check.relative <= check.tolerance) == passes
