"""`ops.slice_update` at a place that depends on the inputs, as in a cache.

In keras-hub's decoders torch fixes the place while it traces; tf2onnx has no
operator for it.
"""

from contextlib import AbstractContextManager
from typing import Any

import keras

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Puts the update between what is before and after it."""
    real = keras.ops.slice_update

    def slice_update(inputs: Any, start_indices: Any, updates: Any) -> Any:
        axis = _axis(inputs, start_indices, updates)
        if axis is None:
            return real(inputs, start_indices, updates)
        start = start_indices[axis]
        stop = start + keras.ops.shape(updates)[axis]
        before = (slice(None),) * axis
        parts = [
            inputs[(*before, slice(None, start))],
            updates,
            inputs[(*before, slice(stop, None))],
        ]
        return keras.ops.concatenate(parts, axis=axis)

    return replaced(keras.ops, slice_update=slice_update)


def _axis(inputs: Any, start_indices: Any, updates: Any) -> int | None:
    """The only axis that the update does not fill, if it fills all others."""
    if not isinstance(start_indices, (list, tuple)):
        return None
    sizes = zip(inputs.shape, updates.shape, strict=True)
    open_axes = [
        axis
        for axis, (start, (size, other)) in enumerate(
            zip(start_indices, sizes, strict=True)
        )
        if not _is_zero(start) or not _same(axis, size, other)
    ]
    return open_axes[0] if len(open_axes) == 1 else None


def _is_zero(start: Any) -> bool:
    return isinstance(start, int) and start == 0


def _same(axis: int, size: Any, other: Any) -> bool:
    """Whether two sizes are the same; TensorFlow knows no batch's."""
    return axis == 0 if size is None else bool(size == other)
