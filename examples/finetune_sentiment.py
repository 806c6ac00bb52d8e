"""Fine-tune a pretrained encoder with LoRA and ship it as int8 ONNX.

python examples/finetune_sentiment.py path/to/all-MiniLM-L6-v2
"""

import json
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np

import keras_peft

DATA = Path(__file__).parent / "data" / "uci_sentiment.jsonl"
LABELS = ["negative", "positive"]


def load_sentences(split):
    with DATA.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["split"] == split]
    return [row["text"] for row in rows], np.array([r["label"] for r in rows])


def build_preprocessor(preset, sequence_length=48):
    # Uncased BERT drops accents; keras-hub has to be told.
    tokenizer = keras_hub.models.BertTokenizer.from_preset(
        preset, strip_accents=True
    )
    return keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=sequence_length
    )


def build_classifier(preset):
    """A sentence encoder with a mean-pooling head."""
    backbone = keras_hub.models.BertBackbone.from_preset(preset)
    hidden = backbone(backbone.input)["sequence_output"]
    mask = backbone.input["padding_mask"]
    pooled = keras.layers.GlobalAveragePooling1D()(hidden, mask=mask)
    pooled = keras.layers.Dropout(0.1)(pooled)
    logits = keras.layers.Dense(len(LABELS), name="logits")(pooled)
    return keras.Model(backbone.input, logits, name="sentiment")


def train(model, inputs, labels, learning_rate=2e-3, epochs=3, **kwargs):
    steps = epochs * -(-len(labels) // 32)
    schedule = keras.optimizers.schedules.PolynomialDecay(learning_rate, steps)
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(inputs, labels, batch_size=32, epochs=epochs, **kwargs)


def main(preset):
    keras.utils.set_random_seed(0)
    preprocessor = build_preprocessor(preset)
    texts, labels = load_sentences("train")
    model = build_classifier(preset)
    keras_peft.adapt(model, keras_peft.LoRA(rank=8))
    train(model, preprocessor(texts), labels)
    keras_peft.save_adapter(model, "sentiment-adapter/")
    keras_peft.merge(model)
    report = keras_peft.export.to_onnx(
        model,
        "sentiment-app/",
        quantize="int8",
        preprocessor=preprocessor,
        labels=LABELS,
        evaluation=load_sentences("test"),
    )
    print(report)


if __name__ == "__main__":
    main(sys.argv[1])
