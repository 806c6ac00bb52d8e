"""Samples as a user has them, as batches that a graph takes."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_peft.export.measure import ROWS_PER_RUN
from keras_peft.export.result import Forward
from keras_peft.export.result import TensorSpec
from keras_peft.export.text import TextPreprocessing
from keras_peft.export.text import encode_with_keras

Batch = dict[str, np.ndarray]

# Padding is masked exactly, so only rounding may show: a few units in the
# last place per layer, over tens of layers.
PADDING_TOLERANCE = 1e-4
SHORT_TEXT = "A short text."


@dataclasses.dataclass(frozen=True)
class Rows:
    """Samples in batches of a few rows, and as texts where they were such."""

    batches: list[Batch]
    texts: list[str] | None = None


def is_texts(samples: Any) -> bool:
    """Whether `samples` is a list of strings."""
    return (
        isinstance(samples, Sequence | np.ndarray)
        and not isinstance(samples, str)
        and len(samples) > 0
        and isinstance(samples[0], str)
    )


def read_rows(
    samples: Any,
    preprocessor: Any,
    inputs: Sequence[TensorSpec],
    trim: bool,
) -> Rows:
    """Texts, an array, or a dictionary of arrays, as small batches.

    Args:
        samples: What `model.predict` takes.
        preprocessor: What makes inputs of texts.
        inputs: The inputs of the graph.
        trim: Whether to cut padding that all rows of a batch have.
    """
    texts = [str(text) for text in samples] if is_texts(samples) else None
    if texts is None:
        return Rows(_split(_by_name(samples, inputs), inputs))
    if preprocessor is None:
        raise ValueError(
            "Texts need a preprocessor to become inputs. Pass `preprocessor=`, "
            "or arrays by input name. Received: a model without preprocessor"
        )
    chunks = [
        texts[start : start + ROWS_PER_RUN]
        for start in range(0, len(texts), ROWS_PER_RUN)
    ]
    batches = []
    for chunk in chunks:
        batch = _renamed(encode_with_keras(preprocessor, chunk), inputs)
        batch = _typed(batch, inputs)
        batches.append(_trimmed(batch, inputs) if trim else batch)
    return Rows(batches, texts)


def padding_is_free(
    forward: Forward,
    preprocessor: Any,
    text: TextPreprocessing,
    inputs: Sequence[TensorSpec],
) -> bool:
    """Whether the outputs for a text do not depend on its padding.

    They do where a model ignores the mask or has no free length; such a
    model must be fed the length it was trained with.
    """
    if text.settings["padding"]["to"] == "longest":
        return False  # Nothing to win.
    if any(isinstance(spec.shape[-1], int) for spec in inputs):
        return False
    rows = read_rows([SHORT_TEXT], preprocessor, inputs, trim=False)
    padded, cut = rows.batches[0], _trimmed(rows.batches[0], inputs)
    left = text.settings["padding"]["side"] == "left"
    for long, short in zip(forward(padded), forward(cut), strict=True):
        if long.shape != short.shape:
            length = short.shape[1]
            long = long[:, -length:] if left else long[:, :length]
        scale = max(float(np.abs(short).max(initial=0)), 1e-30)
        if not np.abs(long - short).max(initial=0) <= PADDING_TOLERANCE * scale:
            return False
    return True


def _by_name(samples: Any, inputs: Sequence[TensorSpec]) -> Batch:
    names = [spec.name for spec in inputs]
    if not isinstance(samples, Mapping) and len(names) == 1:
        samples = {names[0]: samples}
    if not isinstance(samples, Mapping) or set(samples) != set(names):
        given = sorted(samples) if isinstance(samples, Mapping) else "an array"
        raise ValueError(
            "Samples are texts, or a dictionary with an array per input: "
            f"{names}. Received: {given}"
        )
    arrays = {n: keras.ops.convert_to_numpy(samples[n]) for n in names}
    return _typed(arrays, inputs)


def _renamed(batch: Batch, inputs: Sequence[TensorSpec]) -> Batch:
    """A tokenizer alone feeds the only input, whatever that is called."""
    if list(batch) == ["token_ids"] and len(inputs) == 1:
        return {inputs[0].name: batch["token_ids"]}
    return batch


def _typed(batch: Batch, inputs: Sequence[TensorSpec]) -> Batch:
    return {s.name: np.asarray(batch[s.name]).astype(s.dtype) for s in inputs}


def _split(arrays: Batch, inputs: Sequence[TensorSpec]) -> list[Batch]:
    rows = len(arrays[inputs[0].name])
    return [
        {n: value[start : start + ROWS_PER_RUN] for n, value in arrays.items()}
        for start in range(0, rows, ROWS_PER_RUN)
    ]


def _trimmed(batch: Batch, inputs: Sequence[TensorSpec]) -> Batch:
    """Without the columns in which every row is padding."""
    mask = batch.get("padding_mask")
    if mask is None or any(isinstance(s.shape[-1], int) for s in inputs):
        return batch
    used = np.flatnonzero(mask.any(axis=0))
    if not len(used):
        return batch
    keep = slice(int(used[0]), int(used[-1]) + 1)
    return {name: value[:, keep] for name, value in batch.items()}
