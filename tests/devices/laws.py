"""What holds on several devices as it does on one."""

import keras
import numpy as np
from models import build
from models import data
from models import fit
from models import values

import keras_peft

# Products, means and gradients of float32 are summed in another order: each
# of four steps moves a weight of about 0.1 by sums of some hundred terms.
CLOSE = dict(rtol=1e-4, atol=1e-6)


def adapted(model=None):
    model = model or build("llama")
    keras.utils.set_random_seed(1)
    return keras_peft.adapt(model, keras_peft.LoRA(2))


def inputs_of():
    inputs = data("llama")[0]
    # All tokens count: means over rows are then means over tokens.
    return {**inputs, "padding_mask": np.ones((8, 6), "int32")}


def trained(model, **kwargs):
    """The losses of two epochs of plain SGD, in batches of four."""
    return fit(
        model,
        "llama",
        optimizer=keras.optimizers.SGD(0.1),
        inputs=inputs_of(),
        **kwargs,
    )


def predicted(model):
    predict = keras.Model.predict
    return predict(model, inputs_of(), batch_size=4, verbose=0)


def base_of(model):
    trainable = {v.path for v in model.trainable_variables}
    found = values(model.variables)
    return {path: v for path, v in found.items() if path not in trainable}


def assert_same_training(found, expected):
    """Of `(model, losses)` each."""
    np.testing.assert_allclose(found[1], expected[1], **CLOSE)
    ours, theirs = (values(m.trainable_variables) for m, _ in (found, expected))
    for value, other in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_allclose(value, other, **CLOSE)
    # They moved by far more than that.
    moved = values(adapted().trainable_variables)
    differences = [
        np.abs(value - other).max()
        for value, other in zip(theirs.values(), moved.values(), strict=True)
    ]
    assert max(differences) > 1e-3
