"""Models of text with images or films."""

import dataclasses

import numpy as np

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task
from zoo.causal import language_model
from zoo.causal import next_tokens

LAYERS = 2

TEXT = dict(
    vocabulary_size=50,
    embedding_dim=20,
    hidden_dim=20,
    num_layers=LAYERS,
    num_heads=2,
    intermediate_dim=28,
    max_sequence_length=32,
)
VISION = dict(
    image_shape=(12, 12, 3),
    patch_size=4,
    hidden_dim=16,
    num_layers=LAYERS,
    num_heads=4,
    intermediate_dim=24,
)
# Queries, keys, values and outputs; two layers forward.
BLOCKS = dict(attention=4 * LAYERS, mlp=2 * LAYERS)


def two_towers(name, vision, text, known, **settings):
    """A case of a backbone with two of `keras_hub.models` inside."""

    def make():
        import keras_hub

        kind = getattr(keras_hub.models, name)
        return kind(
            vision_encoder=vision.make(), text_encoder=text.make(), **settings
        )

    towers = (vision, text)
    counts = {
        group: sum(getattr(tower, group) for tower in towers)
        for group in ("attention", "mlp", "embeddings", "convolutions")
    }
    return Case(name, make, **counts | known)


def ended(case):
    """The case with the token of an end last in each row, and only there."""

    def inputs(model, rows):
        batch = case.batch(model, rows)
        tokens = np.where(batch["token_ids"] == END, 0, batch["token_ids"])
        tokens[:, -1] = END
        return {**batch, "token_ids": tokens}

    return dataclasses.replace(case, inputs=inputs)


def equal_prompts(batch):
    """Prompts of one length: what follows the shortest, a row does not see."""
    return _prompts(batch, batch["padding_mask"].sum(-1).min())


def only_start(batch):
    """Prompts of one token: an image has no other beginning of a text."""
    return _prompts(batch, 1)


def _prompts(batch, length):
    tokens = batch["token_ids"]
    mask = np.broadcast_to(np.arange(tokens.shape[1]) < length, tokens.shape)
    return {**batch, "padding_mask": mask}


# What MetaCLIP 2 pools at; without one, backends choose different places.
END = 2

CLIP_VISION = backbone(
    "CLIPVisionEncoder", VISION, **BLOCKS, embeddings=1, convolutions=1
)
CLIP_TEXT = backbone("CLIPTextEncoder", TEXT, **BLOCKS, embeddings=1)
META_CLIP_VISION = backbone(
    "MetaCLIP2VisionEncoder", VISION, **BLOCKS, embeddings=1, convolutions=1
)
META_CLIP_TEXT = ended(
    backbone("MetaCLIP2TextEncoder", TEXT, **BLOCKS, embeddings=1)
)
# A projection for either tower.
PROJECTED = dict(linear=12 * LAYERS + 2)

SIGLIP_VISION = backbone(
    "SigLIPVisionEncoder",
    VISION | dict(hidden_dim=20),
    # The pooling at the end attends, and feeds forward too.
    attention=4 * LAYERS + 4,
    mlp=2 * LAYERS + 2,
    embeddings=1,
    convolutions=1,
)
SIGLIP_TEXT = backbone(
    "SigLIPTextEncoder",
    TEXT,
    **BLOCKS,
    # A projection.
    linear=6 * LAYERS + 1,
    # Tokens and positions.
    embeddings=2,
)

PALI_GEMMA = backbone(
    "PaliGemmaBackbone",
    dict(
        vocabulary_size=50,
        image_size=12,
        num_layers=LAYERS,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=24,
        intermediate_dim=40,
        head_dim=8,
        vit_patch_size=4,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_num_layers=LAYERS,
        vit_intermediate_dim=28,
    ),
    # In a vision transformer, and in a decoder with a gate.
    attention=4 * LAYERS + 4 * LAYERS,
    mlp=2 * LAYERS + 3 * LAYERS,
    # From images to text.
    linear=13 * LAYERS + 1,
    embeddings=2,
    convolutions=1,
)


def make_gemma3():
    import keras_hub

    # Four patches by four, of which each two by two become one token.
    vision = keras_hub.models.Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        num_heads=2,
        hidden_dim=16,
        num_layers=LAYERS,
        intermediate_dim=28,
        output_dim=24,
        pool_size=2,
    )
    return keras_hub.models.Gemma3Backbone(
        **TEXT_OF_GEMMA3, image_size=16, vision_encoder=vision
    )


TEXT_OF_GEMMA3 = dict(
    vocabulary_size=50,
    num_layers=LAYERS,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=24,
    intermediate_dim=40,
    head_dim=8,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    use_sliding_window_attention=True,
    sliding_window_size=8,
)
GEMMA3 = Case(
    "Gemma3Backbone (images)",
    make_gemma3,
    # In a vision transformer, and in a decoder with a gate.
    attention=4 * LAYERS + 4 * LAYERS,
    mlp=2 * LAYERS + 3 * LAYERS,
    # From images to text.
    linear=13 * LAYERS + 1,
    # Places of the image, and tokens.
    embeddings=2,
    convolutions=1,
)


# -- Parts that are given to a backbone --------------------------------------


def make_parseq():
    import keras_hub

    encoder = keras_hub.models.ViTBackbone(
        image_shape=(12, 12, 3),
        patch_size=4,
        num_layers=LAYERS,
        num_heads=4,
        hidden_dim=16,
        mlp_dim=24,
        use_class_token=False,
    )
    return keras_hub.models.PARSeqBackbone(
        image_encoder=encoder,
        vocabulary_size=26,
        max_label_length=11,
        decoder_hidden_dim=16,
        num_decoder_layers=LAYERS,
        num_decoder_heads=2,
        decoder_mlp_dim=28,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )


PARSEQ = Case(
    "PARSeqBackbone",
    make_parseq,
    # Blocks of the decoder attend to the text, and to the image.
    attention=4 * LAYERS + 8 * LAYERS,
    mlp=2 * LAYERS + 2 * LAYERS,
    # The backbone ends in logits.
    linear=16 * LAYERS + 1,
    # Places of the image, and tokens.
    embeddings=2,
    convolutions=1,
)


def make_parseq_lm():
    import keras_hub

    # It cannot be made without its preprocessor.
    preprocessor = keras_hub.models.PARSeqCausalLMPreprocessor(
        tokenizer=keras_hub.models.PARSeqTokenizer(
            vocabulary=[chr(97 + n) for n in range(23)], max_label_length=11
        ),
        sequence_length=11,
    )
    return keras_hub.models.PARSeqCausalLM(
        backbone=make_parseq(), preprocessor=preprocessor
    )


def characters(model, batch):
    """What is to be read off images: neither a beginning nor padding."""
    return next_tokens(model, batch) % (model.backbone.vocabulary_size - 2)


def make_blip2(language_model):
    import keras_hub

    vision = keras_hub.models.BLIP2VisionEncoder(
        image_size=12,
        patch_size=4,
        num_layers=LAYERS,
        num_heads=4,
        hidden_dim=16,
        intermediate_dim=24,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )
    queries = keras_hub.models.BLIP2QFormer(
        num_query_tokens=5,
        num_layers=LAYERS,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=20,
        vision_dim=16,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
    )
    return keras_hub.models.BLIP2Backbone(
        vision_encoder=vision, qformer=queries, language_model=language_model()
    )


def make_blip2_opt():
    import keras_hub

    return keras_hub.models.BLIP2CustomOPT(
        vocabulary_size=50,
        num_layers=LAYERS,
        num_heads=4,
        hidden_dim=24,
        intermediate_dim=28,
        num_query_tokens=5,
        dropout=0.0,
        max_sequence_length=128,
        qformer_hidden_dim=12,
    )


def make_blip2_t5():
    import keras_hub

    return keras_hub.models.BLIP2FlanT5(
        vocabulary_size=50,
        num_layers=LAYERS,
        num_heads=4,
        hidden_dim=24,
        intermediate_dim=28,
        num_query_tokens=5,
        qformer_hidden_dim=12,
        dropout=0.0,
    )


# The image's encoder, and the one of queries, of which every other block
# attends to the image too.
BLIP2_ENCODERS = dict(attention=4 * LAYERS + (4 * LAYERS + 4), mlp=4 * LAYERS)

BLIP2_OPT = Case(
    "BLIP2Backbone",
    lambda: make_blip2(make_blip2_opt),
    attention=BLIP2_ENCODERS["attention"] + 4 * LAYERS,
    mlp=BLIP2_ENCODERS["mlp"] + 2 * LAYERS,
    # From queries to text.
    linear=18 * LAYERS + 4 + 1,
    # Places of the image; tokens and places of the text.
    embeddings=3,
    convolutions=1,
)
BLIP2_T5 = Case(
    "BLIP2Backbone",
    lambda: make_blip2(make_blip2_t5),
    # The encoder; the decoder, which attends to it too; with a gate.
    attention=BLIP2_ENCODERS["attention"] + 4 * LAYERS + 8 * LAYERS,
    mlp=BLIP2_ENCODERS["mlp"] + 2 * 3 * LAYERS,
    # From queries to text, and to logits.
    linear=30 * LAYERS + 4 + 2,
    embeddings=2,
    convolutions=1,
)

VIDEO_PRISM = backbone(
    "VideoPrismBackbone",
    dict(
        num_frames=3,
        patch_size=4,
        hidden_dim=16,
        intermediate_dim=24,
        num_heads=4,
        num_spatial_layers=LAYERS,
        num_temporal_layers=LAYERS,
        num_auxiliary_layers=LAYERS,
        vocabulary_size=50,
        num_text_layers=LAYERS,
        image_shape=(12, 12, 3),
    ),
    # Four encoders, and the pooling of films.
    attention=4 * 4 * LAYERS + 4,
    mlp=4 * 2 * LAYERS,
    # Patches of images.
    linear=24 * LAYERS + 4 + 1,
    # Places, frames and tokens.
    embeddings=3,
)

CASES: tuple[Case, ...] = (
    CLIP_VISION,
    CLIP_TEXT,
    two_towers(
        "CLIPBackbone", CLIP_VISION, CLIP_TEXT, PROJECTED, projection_dim=12
    ),
    META_CLIP_VISION,
    META_CLIP_TEXT,
    ended(
        two_towers(
            "MetaCLIP2Backbone",
            META_CLIP_VISION,
            META_CLIP_TEXT,
            PROJECTED,
            projection_dim=12,
        )
    ),
    SIGLIP_VISION,
    SIGLIP_TEXT,
    two_towers(
        "SigLIPBackbone",
        SIGLIP_VISION,
        SIGLIP_TEXT,
        dict(linear=12 * LAYERS + 6 + 1),
    ),
    PALI_GEMMA,
    language_model("PaliGemmaCausalLM", PALI_GEMMA, prompt=equal_prompts),
    GEMMA3,
    dataclasses.replace(
        language_model("Gemma3CausalLM", GEMMA3),
        name="Gemma3CausalLM (images)",
    ),
    PARSEQ,
    dataclasses.replace(
        PARSEQ,
        name="PARSeqCausalLM",
        make=make_parseq_lm,
        labels=characters,
        prompt=only_start,
        weights=lambda batch: batch["padding_mask"] > 0,
    ),
    BLIP2_OPT,
    language_model("BLIP2CausalLM", BLIP2_OPT),
    task("BLIP2Seq2SeqLM", BLIP2_T5, {}),
    VIDEO_PRISM,
)
