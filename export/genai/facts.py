"""What a runtime must know of a decoder, however its graph comes about."""

import dataclasses

from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts


@dataclasses.dataclass(frozen=True)
class Facts:
    """Sizes of a decoder.

    Attributes:
        vocabulary_size: How many tokens there are.
        hidden_size: Channels of the stream.
        num_layers: Layers with keys and values.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values.
        head_size: Channels per head.
        kernels: Shapes of what is multiplied with, from which rounding is
            bounded.
        context_length: How many tokens it was made for, where Keras tells.
        genai_type: `model.type` in `genai_config.json`.
        shares_buffer: Whether new keys are written where the old ones lie.
    """

    vocabulary_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    kernels: tuple[tuple[int, ...], ...]
    context_length: int | None = None
    genai_type: str = "decoder"
    shares_buffer: bool = True


def facts_of(decoder: Decoder) -> Facts:
    """Those of a description, whose operator writes into one buffer."""
    attention = decoder.blocks[0].attention
    return Facts(
        vocabulary_size=decoder.vocabulary_size,
        hidden_size=decoder.hidden_size,
        num_layers=len(decoder.blocks),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_size=attention.head_size,
        kernels=tuple(p.kernel.shape for p in parts(decoder, Linear)),
        context_length=decoder.context_length,
        genai_type=decoder.genai_type,
    )
