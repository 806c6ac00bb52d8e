"""Banks of experts: one layer of Keras, one matrix per expert."""

import keras
import numpy as np

from keras_peft.export.genai.decoder import FeedForward
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.reader import Reader


def feed_forwards(
    reader: Reader,
    layer: keras.Layer,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    activation: str,
    biases: tuple[np.ndarray, ...] | None = None,
) -> tuple[FeedForward, ...]:
    """The experts of a bank.

    Args:
        reader: The reader of the model.
        layer: The bank, whose path all experts share.
        gate: `[experts, hidden, inner]`.
        up: Likewise.
        down: `[experts, inner, hidden]`.
        activation: A key of `experts.ALPHAS`.
        biases: Those of the three, `[experts, outputs]`.
    """
    path = reader.path(layer)
    kernels = {"gate": gate, "up": up, "down": down}
    added = dict(zip(kernels, biases, strict=True)) if biases else {}

    def linear(index: int, name: str) -> Linear:
        bias = added[name][index] if added else None
        kernel = kernels[name][index]
        return Linear(path, kernel, bias, part=f"{index}.{name}")

    return tuple(
        FeedForward(
            gate=linear(index, "gate"),
            up=linear(index, "up"),
            down=linear(index, "down"),
            activation=activation,
        )
        for index in range(len(gate))
    )
