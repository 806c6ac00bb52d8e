"""Which linear layers belong to an attention, and which feed forward."""

from collections.abc import Mapping

import keras

from keras_peft import layer_tree
from keras_peft.blocks import attention_paths
from keras_peft.patterns import lies_in

LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)


class Roles:
    """The parts of transformer blocks, among the layers of a model.

    Args:
        layers: `{path: layer}`.
    """

    def __init__(self, layers: Mapping[str, keras.Layer]):
        self.layers = layers
        self.attention = {
            *attention_paths(layers),
            *self._projections(),
            *(path for path, layer in layers.items() if is_mixer(layer)),
        }
        self.matrices = [
            path
            for path, layer in layers.items()
            if any(len(v.shape) > 1 for v in layer_tree.own_variables(layer))
            and not self.attends(path)
            and not self._conditions(path)
        ]
        self.blocks = {self._block_around(path) for path in self.attention}
        self.blocks.discard(None)
        self.blocks |= {p for p, la in layers.items() if _mixes(la)}

    def attends(self, path: str) -> bool:
        """Whether a layer is part of an attention."""
        return lies_in(path, self.attention)

    def feeds_forward(self, path: str) -> bool:
        """Whether a layer belongs to the feed-forward part of a block."""
        inside = any(path.startswith(block + ".") for block in self.blocks)
        return inside and not self.attends(path) and not self._conditions(path)

    def _projections(self):
        """Projections that no attention layer holds.

        They are called so, or they lie beside an attention without weights.
        """
        bare = {
            path.rpartition(".")[0]
            for path, layer in self.layers.items()
            if _is_bare(layer)
        }
        for path, layer in self.layers.items():
            holder, _, name = path.rpartition(".")
            if not isinstance(layer, LINEAR):
                continue
            if {"attention", "attn"} & set(name.split("_")):
                yield path
            elif holder in bare and not _is_graph(self.layers.get(holder)):
                yield path

    def _conditions(self, path):
        """Whether a layer computes scales and shifts from a condition."""
        while path:
            layer = self.layers.get(path)  # A list has a segment of its own.
            if layer is not None and _is_called(layer, "norm", "modulation"):
                return True
            path = path.rpartition(".")[0]
        return False

    def _block_around(self, path):
        """The nearest layer around an attention that holds other matrices.

        What stands further out may hold layers that are in no block: those
        between two stages, or a head.
        """
        while "." in path:
            path = path.rpartition(".")[0]
            layer = self.layers.get(path)
            if layer is None:
                continue
            if _is_graph(layer):
                return None
            if any(lies_in(matrix, [path]) for matrix in self.matrices):
                return path
        return None


def is_mixer(layer: keras.Layer) -> bool:
    """Whether a layer attends without an attention, step by step."""
    return _is_called(layer, "timemix", "deltanet")


def _is_called(layer, *words):
    """Whether the name of a layer's class has one of `words` in it."""
    name = layer_tree.base_class(layer).__name__.lower().replace("_", "")
    return any(word in name for word in words)


def _is_bare(layer):
    """Whether a layer attends with what others project."""
    return _is_called(layer, "attention") and not layer.variables


def _mixes(layer):
    """Whether a layer is a block that mixes tokens without weights.

    A Fourier transform does so: what is left are two normalizations, and two
    linear layers to another size and back.
    """
    children = [child for _, child in layer_tree.children(layer)]
    held = [child for child in children if layer_tree.own_variables(child)]
    linear = [child for child in held if isinstance(child, LINEAR)]
    if len(held) != 4 or len(linear) != 2 or not layer.built:
        return False
    first, last = (child.kernel.shape for child in linear)
    norms = [child for child in held if _is_called(child, "norm")]
    return len(norms) == 2 and first == last[::-1] and not _is_graph(layer)


def _is_graph(layer):
    """Whether a layer only joins others, as a functional model does.

    `None` stands for the model itself, which is no block either.
    """
    joins = isinstance(layer, keras.Sequential) or hasattr(layer, "operations")
    return layer is None or joins
