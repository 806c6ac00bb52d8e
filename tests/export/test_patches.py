"""Every patch of a tracing library is still needed, and does its work."""

from typing import Any

import keras
import numpy as np
import onnxruntime
import pytest

from keras_peft.export import patches
from keras_peft.export.patches import erfc
from keras_peft.export.patches import grouped_convolution
from keras_peft.export.patches import symbolic_integer
from keras_peft.export.signature import read_signature


def _counting():
    """The position of every token, as an array of a free length."""

    @keras.saving.register_keras_serializable("tests")
    class Positions(keras.layers.Layer):
        def call(self, inputs):
            positions = keras.ops.arange(inputs.shape[1])
            return inputs + keras.ops.cast(positions, inputs.dtype)

    inputs = keras.Input((None,))
    return keras.Model(inputs, Positions()(inputs))


def _convolution():
    inputs = keras.Input((6, 6, 4))
    return keras.Model(inputs, keras.layers.Conv2D(4, 3, groups=2)(inputs))


def _gelu():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.ops.gelu(inputs * 1.0, approximate=False))


# The smallest model that fails without each patch.
NEEDS: dict[Any, Any] = {
    erfc: _gelu,
    grouped_convolution: _convolution,
    symbolic_integer: _counting,
}


def _patches():
    return patches.PATCHES.get(keras.config.backend(), ())


def _error(model, path, but=()):
    """How far the graph is from the model on another batch; `inf` without."""
    signature = read_signature(model)
    rng = np.random.default_rng(0)

    def batch(rows, length):
        return {
            i.name: rng.normal(
                size=i.sized(
                    {
                        a: rows if a == "batch" else length
                        for a in signature.axes
                    }
                )
            ).astype(i.dtype)
            for i in signature.inputs
        }

    try:
        if keras.config.backend() == "torch":
            from keras_peft.export import trace_torch

            trace_torch.trace(model, signature, batch(2, 5), path, but)
        else:
            from keras_peft.export import trace_tensorflow

            trace_tensorflow.trace(model, signature, path, but)
        session = onnxruntime.InferenceSession(path)
        given = batch(3, 7)
        names = [value.name for value in session.get_inputs()]
        flat = dict(zip(names, given.values(), strict=True))
        found = session.run(None, flat)[0]
    except Exception:
        return np.inf
    wanted = keras.ops.convert_to_numpy(signature.call(model, given))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.slice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patch", _patches(), ids=lambda p: p.__name__)
def test_a_patch_is_needed_and_mends(patch, tmp_path):
    model = NEEDS[patch]()
    # A few float32 roundings of values of the same size.
    assert _error(model, tmp_path / "mended.onnx") <= 2.0**-20
    assert _error(model, tmp_path / "plain.onnx", but=(patch,)) > 1e-3, (
        f"{patch.__name__} mends what is mended already: remove it"
    )
