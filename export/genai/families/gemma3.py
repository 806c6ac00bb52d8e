"""Gemma 3 without images: windows and angles of two kinds of blocks."""

import keras

from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.families import gemma
from keras_peft.export.genai.reader import Reader


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    if backbone.vision_encoder is not None:
        raise ValueError(
            "This Gemma 3 reads images, which the graph of a language model "
            "does not. Load one of text alone, such as gemma3_1b, or build "
            "the backbone with `vision_encoder=None`. "
            f"Received: {backbone.name!r} with a vision encoder"
        )
    if backbone.use_bidirectional_attention:
        raise ValueError(
            "This Gemma 3 attends to later tokens, as models of embeddings "
            "do: it writes no text. Export it with "
            "`keras_peft.export.to_onnx`. "
            f"Received: {backbone.name!r} with use_bidirectional_attention=True"
        )
    return gemma.decoder(backbone, reader, "gemma3_text")
