"""`ops.fft2` as products with matrices of cosines and sines, as for FNet.

Complex numbers stop tf2onnx and LiteRT.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import keras

from keras_peft.replacing import replaced

ops = keras.ops


def patched() -> AbstractContextManager[None]:
    """Transforms without complex numbers."""
    return replaced(keras.src.backend.math, fft2=_fft2)


def _fft2(x: Any) -> Any:
    """`(real, imaginary)` part of the transform of such a pair."""
    real, imaginary = x
    cosines, sines = _waves(ops.shape(real)[-1])
    real, imaginary = (
        ops.matmul(real, cosines) + ops.matmul(imaginary, sines),
        ops.matmul(imaginary, cosines) - ops.matmul(real, sines),
    )
    cosines, sines = _waves(ops.shape(real)[-2])
    return (
        ops.matmul(cosines, real) + ops.matmul(sines, imaginary),
        ops.matmul(cosines, imaginary) - ops.matmul(sines, real),
    )


def _waves(size: Any) -> Any:
    """Cosines and sines of `2 pi i j / size`, each of `(size, size)`."""
    positions = ops.arange(size, dtype="int32")
    # Whole turns come off while numbers are whole: cosines of large angles
    # lose digits.
    turns = ops.mod(positions[:, None] * positions[None, :], size)
    angles = ops.cast(turns, "float32") * (2 * math.pi)
    angles = angles / ops.cast(size, "float32")
    return ops.cos(angles), ops.sin(angles)
