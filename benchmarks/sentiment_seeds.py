"""LoRA against full fine-tuning over several seeds, on real weights and data.

python benchmarks/sentiment_seeds.py [--seeds 3] [--sweep] [--preset FOLDER]

Fine-tunes all-MiniLM-L6-v2 on the UCI sentiment sentences as
`examples/finetune_sentiment.py` does, and prints accuracy on the test split;
with `--sweep` at several learning rates, which matter as much as the method.
"""

import argparse
import sys
import time
from pathlib import Path

import keras
import numpy as np
from runs.data import installed_preset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from finetune_sentiment import build_classifier
from finetune_sentiment import build_preprocessor
from finetune_sentiment import load_sentences
from finetune_sentiment import train

import keras_peft

# The first of each is the one without a sweep.
RATES = {"lora": (2e-3, 1e-3, 4e-3), "full": (1e-4, 2e-5, 5e-5, 2e-4)}


def run(preset, method, rate, seed, train_set, test_set):
    keras.utils.set_random_seed(seed)
    model = build_classifier(preset)
    if method == "lora":
        keras_peft.adapt(model, keras_peft.LoRA(rank=8))
    count = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    start = time.perf_counter()
    train(model, *train_set, learning_rate=rate, verbose=0)
    seconds = time.perf_counter() - start
    logits = model.predict(test_set[0], verbose=0)
    accuracy = float((logits.argmax(-1) == test_set[1]).mean())
    print(
        f"{method:5} rate {rate:g} seed {seed}: accuracy {accuracy:.4f}, "
        f"{seconds:.0f} s, {count:,} trainable",
        flush=True,
    )
    return accuracy


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--preset", default=None)
    options = parser.parse_args()
    preset = options.preset or installed_preset()
    preprocessor = build_preprocessor(preset)
    sets = []
    for split in ("train", "test"):
        texts, labels = load_sentences(split)
        inputs = keras.tree.map_structure(np.array, preprocessor(texts))
        sets.append((inputs, labels))
    seeds = range(options.seeds)
    print(f"{options.seeds} seeds on {keras.backend.backend()}")
    for method, rates in RATES.items():
        for rate in rates if options.sweep else rates[:1]:
            found = [run(preset, method, rate, s, *sets) for s in seeds]
            print(f"{method:5} rate {rate:g} mean: {np.mean(found):.4f}")


if __name__ == "__main__":
    main()
