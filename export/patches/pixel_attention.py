"""Attention over all pixels in MobileNetV5, with a known number of channels.

keras-hub leaves that number to be inferred. TensorFlow cannot where the number
of rows is free: a model with such a block is neither made nor loaded there.
"""

import sys
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

from keras import ops

from keras_peft.replacing import replaced

_MODULE = "keras_hub.src.models.mobilenetv5.mobilenetv5_attention"


def patched() -> AbstractContextManager[None]:
    """Replaces the call of the layer, where channels come last."""
    module = sys.modules.get(_MODULE)
    if module is None:
        return nullcontext()
    layer = module.Attention2d
    real = layer.call

    def call(
        self: Any, x: Any, attn_mask: Any = None, training: bool = False
    ) -> Any:
        last = self.data_format == "channels_last"
        function = _call if last else real
        return function(self, x, attn_mask=attn_mask, training=training)

    return replaced(layer, call=call)


def _call(self: Any, x: Any, attn_mask: Any, training: bool) -> Any:
    rows, height, width, _ = ops.shape(x)
    sizes = self.num_heads, self.head_dim
    parts = ops.reshape(self.qkv(x), (rows, height * width, 3, *sizes))
    parts = ops.transpose(parts, (2, 0, 3, 1, 4))
    query, key, value = parts[0], parts[1], parts[2]
    scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
    scores *= self.head_dim**-0.5
    if attn_mask is not None:
        scores += attn_mask
    scores = ops.softmax(scores, axis=-1)
    scores = self.attn_drop_layer(scores, training=training)
    # As in keras-hub: the size of a head comes before the pixels.
    found = ops.swapaxes(ops.matmul(scores, value), -1, -2)
    channels = self.num_heads * self.head_dim
    found = self.proj(ops.reshape(found, (rows, height, width, channels)))
    return self.proj_drop_layer(found, training=training)
