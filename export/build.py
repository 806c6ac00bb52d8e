"""From a merged Keras model to a checked ONNX graph in memory."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_peft.export.result import OnnxResult


def build_onnx(
    model: keras.Model,
    quantize: str | None = None,
    calibration: Any | Sequence[Any] | None = None,
    tolerance: float | None = None,
) -> OnnxResult:
    """Traces, optimizes, quantizes and checks `model`; writes nothing.

    Args:
        model: A built Keras model without adapters, on any backend.
        quantize: `None` for float32, `"float16"`, or `"int8"`.
        calibration: Real inputs to check with: one batch or a sequence of
            batches. A batch is an array, or a dictionary of arrays by input
            name. Inputs are made from the model's input specs by default.
        tolerance: Largest accepted difference of the final graph, relative
            to the largest magnitude of each output. By default a float32
            graph must meet a bound derived from rounding, and a quantized
            graph is measured and reported only.

    Returns:
        An `OnnxResult`.
    """
    raise NotImplementedError
