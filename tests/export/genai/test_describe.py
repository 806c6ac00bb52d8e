"""What `families.describe` refuses."""

import keras
import keras_hub
import pytest

from keras_peft.export.genai import families


def test_an_architecture_without_description_says_what_one_needs():
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=9,
        num_layers=1,
        num_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
    )
    model = keras_hub.models.BertTextClassifier(backbone, 2, preprocessor=None)
    with pytest.raises(ValueError, match=r"one file in .*BertBackbone"):
        families.describe(model)


def test_a_model_without_backbone_is_refused():
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="backbone=None"):
        families.describe(model)
