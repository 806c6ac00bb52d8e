"""A keras-hub text preprocessor as data: tokenizer, framing, padding.

`tokenizer.json` holds all of it where a tokenizer file can be exact. Where
none can, the SentencePiece model itself is shipped, and the settings say how
to frame and pad its ids.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tokenizers
from keras_hub.tokenizers import SentencePieceTokenizer
from keras_hub.tokenizers import Tokenizer

from keras_peft.export.packing import Packing
from keras_peft.export.packing import add_packing
from keras_peft.export.packing import encode
from keras_peft.export.packing import read_packing
from keras_peft.export.result import TensorSpec
from keras_peft.export.sentence_piece import piece_ids
from keras_peft.export.tokenizer import convert_tokenizer
from keras_peft.export.tokenizer import special_tokens
from keras_peft.export.tokenizer_check import TEXTS
from keras_peft.export.tokenizer_check import differing_lines

SENTENCE_PIECE_FILE = "vocabulary.spm"


@dataclasses.dataclass(frozen=True)
class TextPreprocessing:
    """What stands for a keras-hub text preprocessor.

    Attributes:
        settings: The entry `text` of `preprocessor.json`.
        tokenizer: What to write as `tokenizer.json`, if it is exact.
        sentence_piece: The model to write where it is not.
    """

    settings: dict[str, Any]
    tokenizer: tokenizers.Tokenizer | None = None
    sentence_piece: bytes | None = None

    def pad_to_longest(self) -> None:
        """From now on pads a batch to its longest text, which is faster."""
        self.settings["padding"]["to"] = "longest"
        if self.tokenizer is not None:
            padding = {**(self.tokenizer.padding or {}), "length": None}
            self.tokenizer.enable_padding(**padding)


def describe_text(
    preprocessor: Any, inputs: Sequence[TensorSpec], texts: Sequence[str] = ()
) -> TextPreprocessing:
    """`preprocessor` as data, proven equal on a corpus and on `texts`.

    Args:
        preprocessor: A keras-hub text preprocessor or tokenizer.
        inputs: The inputs of the graph, which the ids must reach.
        texts: Lines of the user's own to compare on.

    Raises:
        ValueError: If a line is tokenized differently than by Keras, or the
            preprocessor feeds something that the graph does not take.
    """
    texts = [*TEXTS, *texts]
    layer = tokenizer_layer(preprocessor)
    packing = read_packing(preprocessor)
    expected = encode_with_keras(preprocessor, texts)
    settings = _settings(layer, packing)
    settings["inputs"] = _fields(expected, inputs, packing)
    tokenizer = convert_tokenizer(layer)
    lines = []
    if tokenizer is not None:
        add_packing(tokenizer, packing)
        found = encode(tokenizer, texts, packing)
        lines = differing_lines(texts, expected, found, layer.id_to_token)
        if not lines:
            settings |= {"tokenizer": "tokenizer.json", "checked": len(texts)}
            return TextPreprocessing(settings, tokenizer)
    if isinstance(layer, SentencePieceTokenizer):
        settings |= {"tokenizer": SENTENCE_PIECE_FILE, **piece_ids(layer)}
        return TextPreprocessing(settings, None, layer.proto)
    raise ValueError(_cannot_convert(layer, lines, len(texts)))


def encode_with_keras(
    preprocessor: Any, texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """The inputs that Keras makes of `texts`, each `(texts, tokens)`."""
    if isinstance(preprocessor, Tokenizer):
        return {"token_ids": _pad_with_keras(preprocessor, texts)}
    if hasattr(preprocessor, "generate_preprocess"):
        encoded = preprocessor.generate_preprocess(
            list(texts), sequence_length=preprocessor.sequence_length
        )
    else:
        encoded = preprocessor(list(texts))
    return {
        name: np.asarray(keras.ops.convert_to_numpy(value))
        for name, value in encoded.items()
    }


def tokenizer_layer(preprocessor: Any) -> Tokenizer:
    """The tokenizer inside of `preprocessor`, which may be one itself."""
    if isinstance(preprocessor, Tokenizer):
        return preprocessor
    layer = getattr(preprocessor, "tokenizer", None)
    if layer is None:
        raise TypeError(
            "`preprocessor` must be a keras-hub preprocessor, tokenizer or "
            "image converter. Pass `preprocessor=False` to export without "
            f"one. Received: preprocessor={preprocessor!r}"
        )
    return layer


def _pad_with_keras(layer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    packing = read_packing(layer)
    rows = [[int(id) for id in row] for row in layer(list(texts))]
    length = packing.max_length or max(map(len, rows))
    padded = np.full((len(rows), length), packing.padding_id, "int32")
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def _fields(
    encoded: Mapping[str, np.ndarray],
    inputs: Sequence[TensorSpec],
    packing: Packing,
) -> dict[str, str]:
    """Which input of the graph takes which field of a tokenizer's encoding."""
    names = [spec.name for spec in inputs]
    if list(encoded) == ["token_ids"] and len(names) == 1:
        return {names[0]: "ids"}
    fields = {
        "token_ids": "ids",
        "segment_ids": "type_ids",
        "padding_mask": packing.mask,
    }
    if set(encoded) != set(names) or not fields.keys() >= set(names):
        raise ValueError(
            "`preprocessor` does not fit the inputs of the model. It must "
            f"make {sorted(names)}. Pass the preprocessor that the model was "
            "trained with, or `preprocessor=False` to leave it out of the "
            f"folder. Received: preprocessor makes {sorted(encoded)}"
        )
    return {name: fields[name] for name in names}


def _settings(layer: Tokenizer, packing: Packing) -> dict[str, Any]:
    return {
        "max_length": packing.max_length,
        "padding": {
            "to": "max_length" if packing.max_length else "longest",
            "id": packing.padding_id,
            "side": packing.padding_side,
        },
        "start_ids": list(packing.start),
        "separator_ids": list(packing.separator),
        "end_ids": list(packing.end),
        "special_tokens": special_tokens(layer),
    }


def _cannot_convert(layer: Tokenizer, lines: list[str], total: int) -> str:
    name = type(layer).__name__
    if not lines:
        return (
            f"`{name}` has no form outside of Keras that is known to be exact. "
            "Byte-pair, SentencePiece and word-piece tokenizers that split "
            "the text themselves have one. Pass `preprocessor=False` to leave "
            f"the tokenizer out of the folder. Received: preprocessor={name}"
        )
    return (
        f"The tokenizer file made from `{name}` does not give the inputs that "
        f"Keras gives: {len(lines)} of {total} lines differ. A model must run "
        "on the ids it was trained on. Pass `preprocessor=False` to leave the "
        "tokenizer out of the folder, and please report the lines.\n"
        + "\n".join(lines[:5])
        + f"\nReceived: preprocessor={name}"
    )
