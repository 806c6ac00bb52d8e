"""How many texts a tokenizer of keras-hub reads otherwise than its folder.

    python benchmarks/tokenizer_ids.py HF_FOLDER

Compared are short texts in many scripts, source code and white space: as
keras-hub reads lists of them, as it does in pipelines of `tf.data`, and as it
does once `keras_peft.check_base` has mended it.
"""

import sys

import keras_hub
import tensorflow as tf
import tokenizers

from keras_peft.export.tokenizer_check import TEXTS
from keras_peft.hf_tokenizer import HuggingFaceTokenizer


def in_lists(layer, texts):
    return [[int(id) for id in row] for row in layer(texts)]


def in_pipelines(layer, texts):
    batches = tf.data.Dataset.from_tensor_slices(texts).batch(8).map(layer)
    return [row for batch in batches for row in batch.to_list()]


def main(folder):
    file = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    # Long lines are the same sentence again.
    texts = [text for text in TEXTS if text and len(text) < 2000]
    expected = [file.encode(text, add_special_tokens=False) for text in texts]
    layers = {
        "keras-hub": keras_hub.tokenizers.Tokenizer.from_preset(folder),
        "mended": HuggingFaceTokenizer(file),
    }
    for name, layer in layers.items():
        for read in (in_lists, in_pipelines):
            rows = zip(read(layer, texts), expected, strict=True)
            other = sum(ids != wanted.ids for ids, wanted in rows)
            print(f"{name}, {read.__name__}: {other} of {len(texts)}")


if __name__ == "__main__":
    main(sys.argv[1])
