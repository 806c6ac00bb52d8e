"""The transformer blocks of a model that is about to train."""

import keras

from keras_peft import layer_tree
from keras_peft.blocks import Block
from keras_peft.blocks import find_blocks


def layers_and_blocks(
    model: keras.Model,
) -> tuple[dict[str, keras.Layer], list[Block]]:
    """Layers by path, and the blocks among them: one at least."""
    layers = layer_tree.layers_by_path(model)
    blocks = find_blocks(layers)
    if not blocks:
        raise ValueError(
            "The model has no transformer blocks, layers that hold an "
            "attention and a feed-forward part, which this acts on. "
            f"Received: model={model.name!r}"
        )
    return layers, blocks
