"""What each layer and table of a decoder is stored as."""

from collections.abc import Mapping

import numpy as np

from keras_peft.export.blockwise import Blockwise
from keras_peft.export.blockwise import quantize as round_to_nearest
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.decoder import Experts
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import Table
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.storage import Float
from keras_peft.export.genai.storage import Plan

BITS = {"int8": 8, "int4": 4}
# Inputs of a block, by bits. Blocks of 64 are multiplied faster, a long prompt
# by up to a fifth; as far as 8 bits can tell, they are as good as smaller ones.
LAYER_BLOCKS = {4: 32, 8: 64}
# Blocks of experts divide all their inputs, which may be few.
EXPERT_BLOCK = 32
# The table and the head decide between tokens directly: in 4 bits they alone
# would cost as much as all other layers together gain.
TABLE_BITS = 8
TABLE_BLOCK = LAYER_BLOCKS[TABLE_BITS]


def plan_storage(
    decoder: Decoder,
    quantize: str | None,
    known: Mapping[str, Blockwise] | None = None,
) -> Plan:
    """Layers and tables by their keys; what is missing stays float32.

    Args:
        decoder: What is stored.
        quantize: As in `keras_peft.export.to_genai`.
        known: Layers of which the integers are chosen already.
    """
    if quantize is None:
        return {}
    layers = {part.key: part for part in parts(decoder, Linear)}
    tables = {part.key: part for part in parts(decoder, Table)}
    if quantize == "float16":
        return {key: Float("float16") for key in (*layers, *tables)}
    for part in parts(decoder, Experts):
        # A rounded score may choose another expert, and is a thousandth of
        # what that expert weighs.
        layers.pop(part.router.key, None)
    known, bits = known or {}, BITS[quantize]
    blocks = dict.fromkeys(layers, LAYER_BLOCKS[bits])
    for part in parts(decoder, Experts):
        for each in parts(part.experts, Linear):
            blocks[each.key] = EXPERT_BLOCK
    # A search that knows nothing of the inputs was worse on real weights: it
    # gives up the largest ones for the many.
    plan = {
        key: known.get(key) or round_to_nearest(part.kernel, bits, blocks[key])
        for key, part in layers.items()
        if part is not decoder.head
    }
    if decoder.head is not None:
        plan[decoder.head.key] = round_to_nearest(
            decoder.head.kernel, TABLE_BITS, TABLE_BLOCK
        )
    rows = np.ascontiguousarray(decoder.table.rows.T)
    plan[decoder.table.key] = round_to_nearest(rows, TABLE_BITS, TABLE_BLOCK)
    return plan


def trained_integers(
    decoder: Decoder, trained: Mapping[str, Blockwise]
) -> dict[str, Blockwise]:
    """What layers of Keras trained in, by the keys of the decoder's parts."""
    return {
        part.key: trained[part.path]
        if part.columns is None
        else trained[part.path].select(part.columns)
        for part in parts(decoder, Linear)
        if part.path in trained
    }
