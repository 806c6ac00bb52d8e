"""Where a model turns hidden states into numbers per class."""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras

from keras_peft import layer_tree

# Operations on every number alone, such as those of a soft cap.
_ELEMENTWISE = {"Divide", "TrueDivide", "Multiply", "Tanh", "Cast"}
_HEADS = (keras.layers.Dense, keras.layers.ReversibleEmbedding)


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model in two parts.

    Attributes:
        trunk: The model up to the hidden states that the head reads.
        head: The layer that maps each to a number per class.
        steps: The head and what follows it, in order.
        outputs: The model's symbolic outputs.
    """

    trunk: keras.Model
    head: keras.Layer
    steps: Sequence[Callable[[Any], Any]]
    outputs: keras.KerasTensor

    def logits(self, hidden: Any, mask: Any = None) -> tuple[Any, bool]:
        """What the model computes of hidden states `(tokens, size)`.

        Also returns whether their mask, if they have one, is handed on.
        """
        rank, shape = len(self.outputs.shape), keras.ops.shape(hidden)
        ones = (1,) * (rank - 2)
        outputs = keras.ops.reshape(hidden, (*ones, *shape))
        if mask is not None:
            mask = keras.ops.reshape(mask, (*ones, shape[0]))
            layer_tree.set_keras_mask(outputs, mask)
        for step in self.steps:
            outputs = step(outputs)
        masked = layer_tree.get_keras_mask(outputs) is not None
        logits = keras.ops.reshape(outputs, (-1, outputs.shape[-1]))
        return logits, masked


def split_model(model: keras.Model) -> SplitModel:
    """Splits a functional model before its last linear layer.

    Raises:
        ValueError: if something else than a linear layer and functions of
            every number alone stands at the model's end.
    """
    outputs = getattr(model, "outputs", None) or []
    if len(outputs) != 1:
        raise ValueError(_no_head(model, f"{len(outputs)} outputs of a graph"))
    steps: list[Callable[[Any], Any]] = []
    for operation, hidden, step in layer_tree.steps_back(outputs[0]):
        steps.insert(0, step)
        if isinstance(operation, _HEADS):
            # Named, so that names of the user's next models stay as they are.
            trunk = keras.Model(model.input, hidden, name=model.name)
            return SplitModel(trunk, operation, steps, outputs[0])
        if type(operation).__name__ not in _ELEMENTWISE:
            raise ValueError(_no_head(model, f"`{operation.name}` at its end"))
    raise ValueError(_no_head(model, "no linear layer at its end"))


def _no_head(model, found):
    return (
        "The loss can be computed in chunks if a functional model ends with a "
        "layer from hidden states to classes, which may be soft-capped: a "
        "`keras.layers.Dense` or the reversed embedding of a causal language "
        "model. Train this model as it is. "
        f"Received: model {model.name!r} with {found}"
    )
