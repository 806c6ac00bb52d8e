"""How token ids become rows of one length: framing, truncation, padding."""

import dataclasses
from typing import Any

import numpy as np
import tokenizers
from keras_hub.tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

# Classifiers of keras-hub mask by id: a `<pad>` in the text is masked too.
MASK_BY_ID = "ids != padding_id"


@dataclasses.dataclass(frozen=True)
class Packing:
    """The frame of a text, `start text end padding`, and of a pair.

    Attributes:
        start: Ids in front of the text.
        separator: Ids between the two texts of a pair.
        end: Ids after the text.
        padding_id: The id that fills a row up to its length.
        padding_side: `"right"` or `"left"`.
        max_length: Length of a row, or `None` where only the longest text of
            a batch decides.
        mask: What a padding mask is made from.
    """

    start: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    padding_id: int = 0
    padding_side: str = "right"
    max_length: int | None = None
    mask: str = MASK_BY_ID


def read_packing(preprocessor: Any) -> Packing:
    """What a keras-hub preprocessor, or a tokenizer alone, does to ids."""
    if isinstance(preprocessor, Tokenizer):
        return Packing(
            padding_id=int(getattr(preprocessor, "pad_token_id", None) or 0),
            max_length=getattr(preprocessor, "sequence_length", None),
        )
    if getattr(preprocessor, "packer", None) is None:
        preprocessor.build(None)
    packer = preprocessor.packer
    generates = hasattr(preprocessor, "generate_preprocess")
    return Packing(
        start=tuple(packer.start_value or ()),
        separator=tuple(getattr(packer, "sep_value", None) or ()),
        # A prompt stays open: the model goes on where it ends.
        end=() if generates else tuple(packer.end_value or ()),
        padding_id=int(packer.pad_value or 0),
        padding_side=packer.padding_side,
        max_length=preprocessor.sequence_length,
        mask="attention_mask" if generates else MASK_BY_ID,
    )


def add_packing(tokenizer: tokenizers.Tokenizer, packing: Packing) -> None:
    """Makes `tokenizer` frame, truncate and pad."""
    frame = {
        "start": packing.start,
        "separator": packing.separator,
        "end": packing.end,
    }
    names = {name for name, ids in frame.items() if ids} | {"$A", "$B"}
    pair = ("start:0", "$A:0", "separator:0", "$B:1", "end:1")
    tokenizer.post_processor = TemplateProcessing(
        single=[name for name in ("start", "$A", "end") if name in names],
        pair=[name for name in pair if name.split(":")[0] in names],
        special_tokens=[
            {
                "id": name,
                "ids": list(ids),
                "tokens": [tokenizer.id_to_token(id) for id in ids],
            }
            for name, ids in frame.items()
            if ids
        ],
    )
    if packing.max_length:
        tokenizer.enable_truncation(packing.max_length)
    tokenizer.enable_padding(
        direction=packing.padding_side,
        pad_id=packing.padding_id,
        pad_token=tokenizer.id_to_token(packing.padding_id),
        length=packing.max_length,
    )


def encode(
    tokenizer: tokenizers.Tokenizer, texts: list[str], packing: Packing
) -> dict[str, np.ndarray]:
    """keras-hub's inputs by name, each `(texts, tokens)`, without Keras."""
    lines = tokenizer.encode_batch(texts)
    ids = np.array([line.ids for line in lines])
    attention = np.array([line.attention_mask for line in lines])
    by_id = packing.mask == MASK_BY_ID
    return {
        "token_ids": ids,
        "segment_ids": np.array([line.type_ids for line in lines]),
        "padding_mask": ids != packing.padding_id if by_id else attention,
    }
