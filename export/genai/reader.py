"""Reading layers of Keras as the parts of a decoder."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_peft import layer_tree
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import Norm
from keras_peft.export.genai.decoder import Table
from keras_peft.kernels import DenseKernel
from keras_peft.kernels import EinsumKernel
from keras_peft.kernels import read


class Reader:
    """The layers of a model by what `decoder` calls them.

    Args:
        model: The model whose paths the parts get.
    """

    def __init__(self, model: keras.Model):
        self._paths = {id(la): path for path, la in layer_tree.walk(model)}

    def path(self, layer: keras.Layer) -> str:
        """The path of a layer, by which adapters know it."""
        return self._paths[id(layer)]

    def linear(
        self,
        layer: keras.Layer,
        columns: np.ndarray | None = None,
        part: str = "",
    ) -> Linear:
        """A `Dense` or `EinsumDense` layer, or some of its columns."""
        dense = isinstance(layer, keras.layers.Dense)
        view = (DenseKernel if dense else EinsumKernel)(layer)
        kernel = view.read()
        bias = None if view.bias is None else view.read_bias()
        if columns is not None:
            kernel = kernel[:, columns]
            bias = None if bias is None else bias[columns]
        return Linear(self.path(layer), kernel, bias, columns, part)

    def norm(self, layer: keras.Layer) -> Norm:
        """A `LayerNormalization`."""
        if not isinstance(layer, keras.layers.LayerNormalization):
            raise TypeError(f"not a LayerNormalization: {layer!r}")
        bias = None if layer.beta is None else read(layer.beta)
        path = self.path(layer)
        return Norm(path, read(layer.gamma), bias, layer.epsilon)

    def rms_norm(self, layer: keras.Layer, offset: float = 0.0) -> Norm:
        """A layer with a `scale` and an `epsilon`, such as `LlamaLayerNorm`.

        `offset` is added to the scale: Gemma stores how far it is from 1.
        """
        scale = read(layer.scale) + np.float32(offset)
        return Norm(self.path(layer), scale, None, layer.epsilon, is_rms=True)

    def table(self, layer: keras.Layer) -> Table:
        """An `Embedding`."""
        return Table(self.path(layer), read(layer.embeddings))

    def head(self, layer: keras.Layer) -> Linear | None:
        """The head of a `ReversibleEmbedding`, or `None` where it is tied."""
        if layer.tie_weights:
            return None
        kernel = read(layer.reverse_embeddings)
        return Linear(self.path(layer), kernel, part="head")


def activation_name(activation: Callable[..., Any]) -> str:
    """What `blocks.ACTIVATIONS` calls a function, found by trying it."""
    points = np.linspace(-4.0, 4.0, 33, dtype="float32")
    known: dict[str, Callable[..., Any]] = {
        "gelu": lambda x: keras.activations.gelu(x, approximate=False),
        "gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True),
        "silu": keras.activations.silu,
        "relu": keras.activations.relu,
    }
    found = ops.convert_to_numpy(activation(points))
    for name, function in known.items():
        # Two spellings of one function differ by float32's rounding; the
        # nearest pair here, the two forms of gelu, by 5e-4.
        if np.allclose(ops.convert_to_numpy(function(points)), found, 0, 1e-5):
            return name
    raise ValueError(
        "No description for an activation. Those which exist are "
        f"{sorted(known)}. Received: {activation!r}"
    )
