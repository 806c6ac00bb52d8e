"""One small classifier and its folder, shared by the tests of the folder."""

import functools
import json
import tempfile
from pathlib import Path

import keras_hub

from keras_peft import export

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the film was good bad great awful and not "
    "very ! , . ##ly ##s <b>"
).split()
LABELS = ["negative", "positive"]
TEXTS = ["The film was good!", "the film was awful, very <b> awful", "Greatly"]
CLASSES = [1, 0, 1]


def tiny_classifier():
    tokenizer = keras_hub.models.BertTokenizer(WORDS, lowercase=True)
    return keras_hub.models.BertTextClassifier(
        backbone=keras_hub.models.BertBackbone(
            vocabulary_size=len(WORDS),
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
            max_sequence_length=24,
        ),
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            tokenizer, sequence_length=24
        ),
        name="tiny",
    )


@functools.cache
def exported():
    """`(folder, model, report)` of an int8 export with labels."""
    model = tiny_classifier()
    folder = Path(tempfile.mkdtemp()) / "tiny"
    report = export.to_onnx(
        model,
        folder,
        quantize="int8",
        calibration=TEXTS,
        labels=LABELS,
        evaluation=(TEXTS, CLASSES),
    )
    return folder, model, report


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))
