"""`ops.image.resize` to a size that depends on the inputs.

Keras asks whether the size is positive. TensorFlow has no answer while it
traces, and raises: in a bilinear `UpSampling2D` of images of a free size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from keras_peft.replacing import replaced


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Hands symbolic sizes to the backend as they are."""
    import keras
    import tensorflow as tf
    from keras.src.ops import image

    real = image.resize

    def resize(images: Any, size: Any, *args: Any, **options: Any) -> Any:
        symbolic = any(isinstance(length, tf.Tensor) for length in size)
        function = image._resize if symbolic else real
        return function(images, size, *args, **options)

    with (
        replaced(image, resize=resize),
        replaced(keras.ops.image, resize=resize),
    ):
        yield
