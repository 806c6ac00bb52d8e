"""Answers sentences from an exported folder: no Keras, ONNX Runtime alone.

python examples/predict.py sentiment-app/ "Such a good phone." "Broke at once."
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers


def predict(folder, sentences):
    """Yields `(label, probability)` for each sentence."""
    folder = Path(folder)
    labels = json.loads((folder / "labels.json").read_text("utf-8"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    rows = tokenizer.encode_batch(sentences)
    parts = {
        "token_ids": [row.ids for row in rows],
        "segment_ids": [row.type_ids for row in rows],
        "padding_mask": [row.attention_mask for row in rows],
    }
    types = {"tensor(bool)": bool, "tensor(int64)": "int64"}
    inputs = {
        spec.name: np.array(parts[spec.name], types.get(spec.type, "int32"))
        for spec in session.get_inputs()
    }
    (logits,) = session.run(None, inputs)
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    for row in odds / odds.sum(axis=-1, keepdims=True):
        yield labels[row.argmax()], row.max()


if __name__ == "__main__":
    sentences = sys.argv[2:]
    answers = predict(sys.argv[1], sentences)
    for sentence, (label, odds) in zip(sentences, answers, strict=True):
        print(f"{label:9} {odds:4.0%}  {sentence}")
