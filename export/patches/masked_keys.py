"""Masks of ESM and RoFormer V2 over keys, as on torch.

From the mask of a text they make one column. Elsewhere than on torch it is
handed to attention as it is, where it masks queries: padding is attended to.
"""

from contextlib import AbstractContextManager
from typing import Any

import keras

from keras_peft.replacing import replaced


def patched() -> AbstractContextManager[None]:
    """Turns masks of one column into masks of one row."""
    real = keras.ops.dot_product_attention

    def attention(
        query: Any, key: Any, value: Any, mask: Any = None, **options: Any
    ) -> Any:
        if mask is not None and mask.shape[-1] == 1 != mask.shape[-2]:
            mask = keras.ops.swapaxes(mask, -1, -2)
        return real(query, key, value, mask=mask, **options)

    return replaced(keras.ops, dot_product_attention=attention)
