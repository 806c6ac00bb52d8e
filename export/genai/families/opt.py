"""OPT: GPT-2 with `relu`."""

import keras

from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Table
from keras_peft.export.genai.families.gpt2 import block
from keras_peft.export.genai.reader import Reader
from keras_peft.kernels import read


def describe(backbone: keras.Model, reader: Reader) -> Decoder:
    """See `families.describe`."""
    layer = backbone.embeddings.position_embedding
    positions = Table(reader.path(layer), read(layer.position_embeddings))
    return Decoder(
        table=reader.table(backbone.token_embedding),
        head=reader.head(backbone.token_embedding),
        positions=positions,
        blocks=tuple(block(la, reader) for la in backbone.transformer_layers),
        norm=reader.norm(backbone.layer_norm),
        context_length=len(positions.rows),
    )
