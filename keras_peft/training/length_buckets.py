"""Batches of sequences of similar length."""

import bisect
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_peft.training.texts import Batch
from keras_peft.training.texts import batch_of
from keras_peft.training.texts import checked_texts


class LengthBuckets(keras.utils.PyDataset):
    """Batches of similar length, padded to one of a few lengths.

    A sequence is padded to the next of `boundaries`, and shares a batch with
    others of that length. What does not fill a batch moves on to the next
    length, so that an epoch has every sequence once and all epochs together
    at most `len(boundaries) + 1` shapes of batches: JAX compiles a program for
    each.

    For models of every kind, prepared or not. Rows are those of
    `keras_peft.training.pack`, with one sequence each.

    Args:
        sequences: Lists or arrays of token numbers, one per sequence.
        batch_size: Positive integer. Rows of a batch. Either this or
            `tokens_per_batch` must be given.
        tokens_per_batch: Positive integer. The most tokens of a batch, padding
            included, from which follow its rows: one at least.
        weights: Optional lists of numbers, as long as `sequences` are. How
            much it counts to predict each token. All are 1 by default.
        boundaries: Optional positive integers, ascending. The lengths of
            batches. By default those eight multiples of 8 that need the
            least padding.
        shuffle: Boolean. Whether every epoch has other batches, in another
            order. Otherwise they go from short to long. `fit` shuffles the
            order of batches once more unless it is given `shuffle=False`.
        seed: Integer. The same seed gives the same batches in each epoch.
        **kwargs: `workers`, `use_multiprocessing` and `max_queue_size` of
            `keras.utils.PyDataset`.

    Raises:
        ValueError: if a sequence is empty, holds something else than token
            numbers, or is longer than the last of `boundaries`; if `weights`
            has other lengths than `sequences`; if not exactly one of
            `batch_size` and `tokens_per_batch` is given.

    Example:
    >>> batches = keras_peft.training.LengthBuckets(sequences, batch_size=8)
    >>> keras.Model.fit(causal_lm, batches, epochs=3)
    """

    def __init__(
        self,
        sequences: Iterable[Any],
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        weights: Iterable[Any] | None = None,
        boundaries: Iterable[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        sizes = [n for n in (batch_size, tokens_per_batch) if n is not None]
        if len(sizes) != 1 or not isinstance(sizes[0], int) or sizes[0] < 1:
            raise ValueError(
                "Either `batch_size` or `tokens_per_batch` must be a positive "
                f"integer. Received: batch_size={batch_size!r}, "
                f"tokens_per_batch={tokens_per_batch!r}"
            )
        self.texts = checked_texts(sequences, weights)
        lengths = [len(tokens) for tokens, _ in self.texts]
        self.boundaries = _checked_boundaries(boundaries, lengths)
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.buckets: list[list[int]] = [[] for _ in self.boundaries]
        for index, length in enumerate(lengths):
            at = bisect.bisect_left(self.boundaries, length)
            self.buckets[at].append(index)
        self.batches = self._batches()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        length, chosen = self.batches[index]
        return batch_of([[self.texts[i]] for i in chosen], length)

    def on_epoch_end(self) -> None:
        self.epoch += 1
        self.batches = self._batches()

    def _batches(self):
        """`[(length, numbers of sequences)]` of this epoch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        batches, left = [], []
        for length, bucket in zip(self.boundaries, self.buckets, strict=True):
            order = rng.permutation(bucket) if self.shuffle else bucket
            left = [*left, *order]
            rows = self._rows(length)
            full = len(left) // rows * rows
            for start in range(0, full, rows):
                batches.append((length, left[start : start + rows]))
            left = left[full:]
        if left:
            batches.append((self.boundaries[-1], left))
        if self.shuffle:
            rng.shuffle(batches)
        return _unlike_first(batches)

    def _rows(self, length):
        if self.batch_size is not None:
            return self.batch_size
        return max(1, self.tokens_per_batch // length)


def _unlike_first(batches):
    """`batches`, the second of another length than the first.

    On TensorFlow, `fit` takes for fixed what the first two have in common.
    """
    first = batches[0][0]
    other = (i for i, (length, _) in enumerate(batches) if length != first)
    index = next(other, None)
    if index is not None:
        batches.insert(1, batches.pop(index))
    return batches


def _checked_boundaries(boundaries, lengths):
    if boundaries is None:
        return _least_padding(lengths)
    boundaries = list(boundaries)
    whole = all(isinstance(b, int) and b > 0 for b in boundaries)
    ascending = boundaries == sorted(set(boundaries))
    if not (
        boundaries and whole and ascending and boundaries[-1] >= max(lengths)
    ):
        raise ValueError(
            "`boundaries` must be positive integers, ascending, the last of "
            "them at least the length of the longest sequence. Split longer "
            "sequences before, or add a boundary. "
            f"Received: boundaries={boundaries}, sequences of up to "
            f"{max(lengths)} tokens"
        )
    return boundaries


def _least_padding(lengths, most=8, step=8):
    """At most `most` multiples of `step`, with the fewest tokens padded to.

    Found one boundary after the other, from the least tokens that sequences
    up to each length need in all the buckets before.
    """
    rounded = -(-np.asarray(lengths) // step) * step
    sizes, counts = np.unique(rounded, return_counts=True)
    before = np.cumsum([0, *counts])
    # Of a bucket that begins after the first axis and ends with the second.
    tokens = sizes * (before[1:] - before[:-1, None])
    tokens = np.where(np.tri(len(sizes), dtype=bool).T, tokens, np.inf)
    least = np.array([0.0, *[np.inf] * len(sizes)])
    begins = []
    for _ in range(min(most, len(sizes))):
        total = least[:-1, None] + tokens
        begins.append(total.argmin(axis=0))
        least = np.array([np.inf, *total.min(axis=0)])
    end, found = len(sizes), []
    for begin in reversed(begins):
        found.insert(0, int(sizes[end - 1]))
        end = begin[end - 1]
    return found
