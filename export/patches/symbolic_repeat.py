"""`ops.repeat` on torch, as often as a symbol says, as in ESM.

Keras makes a tensor of the symbol: a count that the tracer knows nothing of.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Repeats by views where the count is symbolic."""
    import torch
    from keras.src.backend.torch import numpy

    real = numpy.repeat

    def repeat(x: Any, repeats: Any, axis: int | None = None) -> Any:
        if not isinstance(repeats, torch.SymInt) or axis is None:
            return real(x, repeats, axis)
        x = numpy.convert_to_tensor(x)  # It may be a variable.
        axis = axis % x.ndim
        count = [1] * (x.ndim + 1)
        count[axis + 1] = repeats
        return x.unsqueeze(axis + 1).repeat(count).flatten(axis, axis + 1)

    return replaced(numpy, repeat=repeat)
