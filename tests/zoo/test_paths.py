"""Paths of layers are the same on every backend."""

import pytest

from keras_peft import layer_tree
from zoo import ZOO


@pytest.mark.slice
def test_a_backbone_names_layers_by_the_parts_that_hold_them():
    model = ZOO["SAMBackbone"].build()
    paths = dict(layer_tree.walk(model))
    # On torch Keras does not know of the parts, only of what they hold.
    assert paths["image_encoder"] is model.image_encoder
    blocks = [path for path in paths if path.endswith("attention.qkv")]
    assert blocks
    assert all(path.startswith("image_encoder.") for path in blocks)
