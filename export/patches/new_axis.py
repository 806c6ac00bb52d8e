"""`mask[:, None]` by an operator of its own.

TensorFlow adds axes while it slices. LiteRT slices five axes at most: with a
free size among them the converter gives up on `StridedSlice`, in the attention
of Llama, Gemma, T5 and CLIP.
"""

from contextlib import AbstractContextManager
from typing import Any

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Slices first, and expands the result."""
    import tensorflow as tf

    real = tf.Tensor.__getitem__

    def getitem(tensor: Any, key: Any, *args: Any) -> Any:
        keys = tuple(key) if isinstance(key, tuple | list) else (key,)
        if tensor.shape.rank is None or not any(k is None for k in keys):
            return real(tensor, key, *args)
        keys = _without_ellipsis(keys, tensor.shape.rank)
        plain = tuple(k for k in keys if k is not None)
        if not all(map(_takes_all, plain)):
            tensor = real(tensor, plain)
        axis = 0
        for k in keys:
            if k is None:
                tensor = tf.expand_dims(tensor, axis)
            axis += k is None or isinstance(k, slice)
        return tensor

    return replaced(tf.Tensor, __getitem__=getitem)


def _without_ellipsis(keys: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    given = sum(k is not None and k is not Ellipsis for k in keys)
    return tuple(
        full
        for k in keys
        for full in ([slice(None)] * (rank - given) if k is Ellipsis else [k])
    )


def _takes_all(key: Any) -> bool:
    """Whether a key is `:`; one with tensors in it cannot be compared."""
    return isinstance(key, slice) and all(
        part is None for part in (key.start, key.stop, key.step)
    )
