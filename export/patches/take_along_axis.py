"""`ops.take_along_axis` on torch, as in a masked language model's head.

torch's own function asks for sizes as numbers, which fixes them.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Gathers with indices that are spread over the other axes first."""
    import torch
    from keras.src.backend.torch import numpy

    real = numpy.take_along_axis

    def take_along_axis(x: Any, indices: Any, axis: int | None = None) -> Any:
        if axis is None:
            return real(x, indices, axis)
        shape = list(x.shape)
        indices = indices.long()
        indices = torch.where(indices < 0, indices + shape[axis], indices)
        shape[axis] = indices.shape[axis]
        return torch.gather(x, axis, indices.expand(shape))

    return replaced(numpy, take_along_axis=take_along_axis)
