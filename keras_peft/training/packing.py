"""Several sequences in one row."""

import bisect
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

from keras_peft.training.texts import Batch
from keras_peft.training.texts import Text
from keras_peft.training.texts import batch_of
from keras_peft.training.texts import checked_texts


def pack(
    sequences: Iterable[Any],
    length: int,
    weights: Iterable[Any] | None = None,
    split: bool = False,
) -> Batch:
    """Puts several sequences into each row, so that little is padding.

    Rows of one sequence each are as long as the longest, and the device
    computes their padding too. Here each sequence, the longest first, goes
    into the fullest row that has room for it (best-fit decreasing).

    The model must keep the sequences of a row apart: prepare it by
    `keras_peft.training.prepare(model, packing=True)`. Others take the numbers
    in `padding_mask` for ones, and let sequences see those before them.

    - [Krell et al., 2021](https://arxiv.org/abs/2107.02027)

    Args:
        sequences: Lists or arrays of token numbers, one per sequence, with
            the tokens that begin and end it.
        length: Integer of at least 2. Tokens of a row.
        weights: Optional lists of numbers, as long as `sequences` are. How
            much it counts to predict each token: 0 for those of a prompt, 1
            for those of a response. The first of a sequence is not predicted.
            All are 1 by default.
        split: Boolean. Whether a sequence longer than `length` becomes
            several, which see nothing of each other. Each begins with the last
            token of the one before, so that every token is predicted once. By
            default such a sequence is an error.

    Returns:
        `(x, y, sample_weight)` for `fit`, of shape `(rows, length)` each. `x`
        is a dict of `token_ids` and `padding_mask`, in which the sequences of
        a row have the numbers 1, 2, ... and padding has 0. `y` are the next
        tokens. `sample_weight` is 0 at the last token of a sequence and at
        padding.

    Raises:
        ValueError: if a sequence is empty, holds something else than token
            numbers, or is longer than `length`; if `weights` has other
            lengths than `sequences`; if `length` is out of its range.

    Example:
    >>> weights = [[0] * len(p) + [1] * len(r) for p, r in pairs]
    >>> x, y, sample_weight = keras_peft.training.pack(
    ...     [p + r for p, r in pairs], length=1024, weights=weights
    ... )
    >>> keras_peft.training.prepare(causal_lm, packing=True)
    >>> causal_lm.fit(x, y, sample_weight=sample_weight, batch_size=8)
    """
    if not isinstance(length, int) or length < 2:
        raise ValueError(
            "`length` must be an integer of at least 2: a token, and the one "
            f"that follows it. Received: length={length!r}"
        )
    texts = checked_texts(sequences, weights)
    if split:
        texts = [piece for text in texts for piece in _pieces(text, length)]
    lengths = [len(tokens) for tokens, _ in texts]
    if max(lengths) > length:
        longer = [i for i, each in enumerate(lengths) if each > length]
        raise ValueError(
            f"{len(longer)} of {len(lengths)} sequences are longer than a row. "
            "Pack with `split=True`, in longer rows, or cut them yourself. "
            f"Received: length={length}, sequences of up to {max(lengths)} "
            f"tokens, the first at {longer[0]}"
        )
    rows = best_fit(lengths, length)
    return batch_of([[texts[i] for i in row] for row in rows], length)


def _pieces(text: Text, length: int) -> list[Text]:
    tokens, weights = text
    starts = range(0, max(1, len(tokens) - 1), length - 1)
    return [(tokens[s : s + length], weights[s : s + length]) for s in starts]


def best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Which of `lengths` share a row, in their order as far as can be."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[index], 0))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > lengths[index]:
            bisect.insort(free, (room - lengths[index], row))
    return sorted(map(sorted, rows))
