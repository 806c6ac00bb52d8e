"""Positions of DINOv2 and SAM 3 as they stand in the file of a model.

keras-hub passes over them, and makes them anew from others by an interpolation
that every backend does in its own way; what was learned of them is lost.
"""

import contextlib
import sys
from collections.abc import Iterator

import keras

from keras_peft.replacing import replaced

_LAYERS = {
    "keras_hub.src.models.dinov2.dinov2_layers": "DINOV2Embedding",
    "keras_hub.src.models.sam3.sam3_layers": "SAM3Embedding",
}


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Loads all weights of these layers, as of any other."""
    load = keras.layers.Layer.load_own_variables
    with contextlib.ExitStack() as stack:
        for module, name in _LAYERS.items():
            kind = getattr(sys.modules.get(module), name, None)
            if kind is not None:
                stack.enter_context(replaced(kind, load_own_variables=load))
        yield
