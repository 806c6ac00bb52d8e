import keras
import numpy as np
import pytest

from keras_peft.export.build import build_onnx


def two_inputs():
    a = keras.Input((4,), name="a")
    b = keras.Input((None, 2), name="b")
    pooled = keras.layers.GlobalAveragePooling1D()(b)
    joined = keras.layers.Concatenate()([a, pooled])
    return keras.Model([a, b], keras.layers.Dense(3)(joined))


def batch(**changes):
    arrays = {"a": np.zeros((2, 4)), "b": np.zeros((2, 5, 2))}
    return arrays | changes


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="Received: quantize='int3'"):
        build_onnx(two_inputs(), quantize="int3")


def test_a_model_that_was_never_called_is_refused():
    class Unbuilt(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match="after its first call"):
        build_onnx(Unbuilt())


def test_weights_that_keras_quantized_are_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.layers[0].quantize("int8")
    with pytest.raises(ValueError, match="quantize the graph"):
        build_onnx(model)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "holds no batch"),
        (np.zeros((2, 4)), "dictionary of arrays named"),
        ({"a": np.zeros((2, 4))}, "names every input"),
        (batch(a=np.zeros((2, 5))), r"a: \(2, 5\) where"),
        (batch(a=np.zeros((3, 4))), "axes of one name have one size"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        build_onnx(two_inputs(), calibration=calibration)


def test_every_wrong_shape_of_a_batch_is_listed():
    wrong = batch(a=np.zeros((2, 5)), b=np.zeros((2, 5, 3)))
    with pytest.raises(ValueError, match="a: .*b: "):
        build_onnx(two_inputs(), calibration=wrong)
