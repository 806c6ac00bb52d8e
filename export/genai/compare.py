"""How far a folder is from the Keras model, in logits and on text."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_peft.export.comparison import compare as compare_outputs
from keras_peft.export.comparison import relative
from keras_peft.export.comparison import rounding_of
from keras_peft.export.genai.facts import Facts
from keras_peft.export.genai.runtime import Session
from keras_peft.export.genai.runtime import answer
from keras_peft.export.result import Verification

# Tokens of the prompts, of which the last are fed singly. Of one alone, Keras
# warns that its softmax is over one number.
PROMPTS = (2, 5, 40)
SINGLY = 4
# Of a text, how many tokens are scored in one piece, and in all.
PIECE, MOST = 256, 4096
ANSWER = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What a model makes of a text, token by token.

    Attributes:
        losses: Negative log-likelihood of each token but the first of a piece.
        choices: The most likely token at each of these places.
    """

    losses: np.ndarray
    choices: np.ndarray

    @property
    def loss(self) -> float:
        """The mean over all tokens."""
        return float(self.losses.mean())


def prompts(
    facts: Facts, pieces: Sequence[Sequence[int]], context_length: int
) -> list[list[int]]:
    """Some of the user's text, or made-up tokens where there is none."""
    rng = np.random.default_rng(0)
    found = []
    for index, length in enumerate(PROMPTS):
        length = min(length, context_length - ANSWER)
        own = [p for p in pieces if len(p) >= length]
        ids = rng.integers(0, facts.vocabulary_size, max(length, 1))
        text = own[index % len(own)][:length] if own else ids
        found.append([int(id) for id in text])
    return found


def keras_logits(model: keras.Model, ids: Sequence[int]) -> np.ndarray:
    """What Keras computes for one text, `[tokens, vocabulary]`."""
    row = np.array([ids], "int32")
    inputs = {"token_ids": row, "padding_mask": np.ones_like(row)}
    if "position_ids" in model.input:
        inputs["position_ids"] = np.arange(row.size, dtype="int32")[None]
    outputs = model(inputs, training=False)
    outputs = keras.ops.cast(outputs, "float32")
    return keras.ops.convert_to_numpy(outputs)[0]


def compare_logits(
    session: Session,
    texts: Sequence[Sequence[int]],
    references: Sequence[np.ndarray],
    step: str,
    tolerance: float | None,
) -> Verification:
    """Measures a graph, fed step by step, against Keras."""

    def run(batch: Any) -> list[np.ndarray]:
        ids = list(batch["input_ids"])
        return [session.logits(ids, max(len(ids) - SINGLY, 1))]

    return compare_outputs(
        run,
        [{"input_ids": np.array(ids)} for ids in texts],
        [[reference] for reference in references],
        step,
        tolerance,
    )


def bound(model: keras.Model, facts: Facts) -> float | None:
    """How far two right evaluations may be apart, where both are float32."""
    if model.compute_dtype != "float32":
        return None
    return rounding_of([shape] for shape in facts.kernels)


def score(logits: np.ndarray, ids: Sequence[int]) -> Scores:
    """Scores of one piece of text."""
    logits = logits[:-1].astype("float64")
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
    true = logits[np.arange(len(logits)), np.array(ids[1:])]
    return Scores(total - true, logits.argmax(axis=-1))


def joined(scores: Sequence[Scores]) -> Scores:
    """Scores of all pieces."""
    return Scores(
        np.concatenate([each.losses for each in scores]),
        np.concatenate([each.choices for each in scores]),
    )


def difference(one: Scores, other: Scores) -> tuple[float, float]:
    """How much larger the second's loss is, and the standard error of that."""
    change = other.losses - one.losses
    error = change.std(ddof=1) / math.sqrt(len(change))
    return float(change.mean()), float(error)


def check_answer(
    folder: Path,
    session: Session,
    ids: Sequence[int],
    tolerance: float,
    adapter: Path | None = None,
) -> None:
    """Raises unless onnxruntime-genai says what the graph says.

    Each of its tokens must be the most likely one, or as likely up to
    rounding.
    """
    tokens, chosen_by = answer(folder, ids, ANSWER, adapter)
    whole = session.logits([*ids, *tokens], len(ids))
    expected = whole[len(ids) - 1 : len(ids) - 1 + len(tokens)]
    apart = relative(chosen_by[: len(tokens)], expected)
    scale = np.abs(expected).max()
    chosen = expected[np.arange(len(tokens)), tokens]
    short = float((expected.max(axis=-1) - chosen).max() / scale)
    if apart > tolerance or short > tolerance:
        raise ValueError(
            "onnxruntime-genai does not compute with this folder what ONNX "
            "Runtime computes with the graph; it was discarded. Report this "
            "with the versions of both packages. Received: logits that "
            f"differ by {apart:.2g} of the largest, and a token that is less "
            f"likely by {short:.2g}, where {tolerance:.2g} is rounding"
        )
