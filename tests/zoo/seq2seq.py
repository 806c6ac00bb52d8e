"""Encoder-decoders of text and of sound."""

from typing import Any

import keras

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task

LAYERS = 2
SIZES = dict(
    vocabulary_size=50,
    num_layers=LAYERS,
    num_heads=2,
    hidden_dim=16,
    intermediate_dim=24,
)
# A decoder's layer attends to itself and to the encoder.
ATTENTION = 4 * LAYERS + 8 * LAYERS
GATED_MLP = 3 * LAYERS + 3 * LAYERS


def one_token_prompt(model: keras.Model, rows: int) -> Any:
    """A batch with a decoder's prompt of one token among longer ones.

    Generation starts there: EdRec's caches no more tokens before it starts.
    """
    batch = ED_REC.batch(model, rows)
    batch["decoder_padding_mask"][-1, 1:] = False
    return batch


BART = backbone(
    "BartBackbone",
    SIZES | dict(max_sequence_length=32),
    attention=ATTENTION,
    mlp=2 * LAYERS + 2 * LAYERS,
    embeddings=1,
)
ED_REC = backbone(
    "EdRecBackbone",
    dict(
        vocab_size=50,
        num_layers_enc=LAYERS,
        num_layers_dec=LAYERS,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
    ),
    attention=ATTENTION,
    mlp=GATED_MLP,
    embeddings=1,
)
MOONSHINE = backbone(
    "MoonshineBackbone",
    dict(
        vocabulary_size=50,
        filter_dim=16,
        encoder_num_layers=LAYERS,
        decoder_num_layers=LAYERS,
        hidden_dim=16,
        intermediate_dim=6,
        encoder_num_heads=2,
        decoder_num_heads=2,
    ),
    attention=ATTENTION,
    # The decoder's gate lies in the first of two kernels.
    mlp=2 * LAYERS + 2 * LAYERS,
    embeddings=1,
    convolutions=3,
)
# Bias by relative position is a plain weight of the first layers.
T5 = backbone(
    "T5Backbone",
    SIZES | dict(key_value_dim=6),
    attention=ATTENTION,
    mlp=GATED_MLP,
    embeddings=1,
)
GEMMA = dict(
    vocabulary_size=50,
    encoder_hidden_dim=16,
    encoder_intermediate_dim=24,
    encoder_num_layers=LAYERS,
    encoder_num_attention_heads=4,
    encoder_num_key_value_heads=2,
    encoder_head_dim=6,
    encoder_layer_types=["sliding_attention", "full_attention"],
    decoder_hidden_dim=20,
    decoder_intermediate_dim=28,
    decoder_num_layers=LAYERS,
    decoder_num_attention_heads=4,
    decoder_num_key_value_heads=2,
    decoder_head_dim=6,
    decoder_layer_types=["sliding_attention", "full_attention"],
    sliding_window=4,
)
T5_GEMMA = backbone(
    "T5GemmaBackbone",
    GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    attention=ATTENTION,
    mlp=GATED_MLP,
    # The encoder has a table of its own.
    embeddings=2,
)
T5_GEMMA_2 = backbone(
    "T5Gemma2Backbone",
    GEMMA | dict(decoder_hidden_dim=16),
    # One attention looks at the decoder's and the encoder's tokens together.
    attention=4 * LAYERS + 4 * LAYERS,
    mlp=GATED_MLP,
    embeddings=2,
)
WHISPER = backbone(
    "WhisperBackbone",
    SIZES
    | dict(
        num_mels=10,
        max_encoder_sequence_length=40,
        max_decoder_sequence_length=32,
    ),
    attention=ATTENTION,
    mlp=2 * LAYERS + 2 * LAYERS,
    embeddings=1,
    convolutions=2,
)

CASES: tuple[Case, ...] = (
    BART,
    task("BartSeq2SeqLM", BART, {}),
    ED_REC,
    task("EdRecSeq2SeqLM", ED_REC, {"inputs": one_token_prompt}),
    MOONSHINE,
    task("MoonshineAudioToText", MOONSHINE, {}),
    T5,
    task("T5Seq2SeqLM", T5, {}),
    T5_GEMMA,
    task("T5GemmaSeq2SeqLM", T5_GEMMA, {}),
    T5_GEMMA_2,
    task("T5Gemma2Seq2SeqLM", T5_GEMMA_2, {}),
    WHISPER,
)
