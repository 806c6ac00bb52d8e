"""Sequences of tokens as a language model is trained on them."""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import numpy as np

# The tokens of a sequence, and how much the prediction of each counts.
Text = tuple[np.ndarray, np.ndarray]
# What `fit` takes: `(x, y, sample_weight)`.
Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


def checked_texts(
    sequences: Iterable[Any], weights: Iterable[Any] | None
) -> list[Text]:
    """Sequences with the weights of their tokens, each 1 by default."""
    tokens = [np.asarray(sequence) for sequence in sequences]
    wrong = [i for i, each in enumerate(tokens) if not _is_text(each)]
    if wrong or not tokens:
        given = [tokens[i].tolist() for i in wrong[:3]]
        raise ValueError(
            "`sequences` must hold lists of token numbers, integers of at "
            "least 0, of one token or more each, and hold at least one. "
            "Tokenize texts first, and leave empty ones out. "
            f"Received: {given} at {wrong[:3]} of {len(tokens)} sequences"
        )
    if weights is None:
        counts = [np.ones(len(each), "float32") for each in tokens]
    else:
        counts = [np.asarray(each, "float32") for each in weights]
    shapes, found = ([each.shape for each in a] for a in (tokens, counts))
    if shapes != found:
        raise ValueError(
            "`weights` must hold a number for every token, in lists as long "
            "as those of `sequences`. "
            f"Received: weights for {sum(map(np.size, counts))} tokens in "
            f"{len(counts)} lists, of {sum(map(np.size, tokens))} in "
            f"{len(tokens)}"
        )
    return list(zip(tokens, counts, strict=True))


def _is_text(tokens):
    is_list = tokens.ndim == 1 and tokens.size and tokens.dtype.kind in "iu"
    return is_list and tokens.min() >= 0


def batch_of(rows: Sequence[Sequence[Text]], length: int) -> Batch:
    """The texts of each row one behind the other, then padding."""
    shape = len(rows), length
    token_ids, numbers, targets = (np.zeros(shape, "int32") for _ in range(3))
    sample_weight = np.zeros(shape, "float32")
    for row, texts in enumerate(rows):
        end = 0
        for number, (tokens, weights) in enumerate(texts, start=1):
            start, end = end, end + len(tokens)
            token_ids[row, start:end] = tokens
            numbers[row, start:end] = number
            targets[row, start : end - 1] = tokens[1:]
            sample_weight[row, start : end - 1] = weights[1:]
    x = {"token_ids": token_ids, "padding_mask": numbers}
    return x, targets, sample_weight
