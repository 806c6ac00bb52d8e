"""Banks of experts: one layer of Keras, one matrix per expert."""

import keras
import numpy as np

from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.reader import Reader
from keras_peft.kernels import read


def feed_forwards(
    reader: Reader,
    layer: keras.Layer,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    biases: tuple[np.ndarray, ...] | None = None,
    **rest: float | str,
) -> tuple[FeedForward, ...]:
    """The experts of a bank.

    Args:
        reader: The reader of the model.
        layer: The bank, whose path all experts share.
        gate: `[experts, hidden, inner]`.
        up: Likewise.
        down: `[experts, inner, hidden]`.
        biases: Those of the three, `[experts, outputs]`.
        **rest: What all experts are besides.
    """
    path = reader.path(layer)
    kernels = {"gate": gate, "up": up, "down": down}
    added = dict(zip(kernels, biases or (None, None, None), strict=True))

    def linear(index: int, name: str) -> Linear:
        bias = None if added[name] is None else added[name][index]
        kernel = kernels[name][index]
        return Linear(path, kernel, bias, part=f"{index}.{name}")

    return tuple(
        FeedForward(**{name: linear(n, name) for name in kernels}, **rest)
        for n in range(len(gate))
    )
