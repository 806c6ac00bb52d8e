"""Vision models of transformer blocks."""

from typing import Any

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task

LAYERS = 2
CLASSES = dict(num_classes=3)
BLOCKS: dict[str, Any] = dict(attention=4 * LAYERS, mlp=2 * LAYERS)
# Positions, class tokens and register tokens are plain weights, but for ViT's.
PATCHES = 1

IMAGE = (16, 16, 3)
SIZES = dict(
    image_shape=IMAGE,
    patch_size=4,
    num_layers=LAYERS,
    num_heads=2,
    hidden_dim=16,
)
WIDTH = dict(intermediate_dim=24)

DEIT = backbone("DeiTBackbone", SIZES | WIDTH, **BLOCKS, convolutions=PATCHES)
DINOV2_SIZES = (
    SIZES | WIDTH | dict(num_register_tokens=2, position_embedding_shape=IMAGE)
)
DINOV2 = backbone(
    "DINOV2Backbone", DINOV2_SIZES, **BLOCKS, convolutions=PATCHES
)
DINOV3 = backbone(
    "DINOV3Backbone",
    # A gate beside the first layer.
    SIZES | WIDTH | dict(num_register_tokens=2, use_gated_mlp=True),
    attention=4 * LAYERS,
    mlp=3 * LAYERS,
    convolutions=PATCHES,
)
VIT = backbone(
    "ViTBackbone",
    SIZES | dict(mlp_dim=24),
    **BLOCKS,
    embeddings=1,
    convolutions=PATCHES,
)


# -- Pyramids ----------------------------------------------------------------


def make_depth_anything():
    import keras_hub

    settings = dict(
        image_shape=(24, 24, 3), intermediate_dim=60, use_swiglu_ffn=True
    )
    encoder = keras_hub.models.DINOV2Backbone(**DINOV2_SIZES | settings)
    return keras_hub.models.DepthAnythingBackbone(
        image_encoder=encoder,
        reassemble_factors=[2, 1, 0.5],
        neck_hidden_dims=[5, 6, 7],
        fusion_hidden_dim=4,
        head_hidden_dim=3,
        head_in_index=-1,
    )


LEVELS = 3
DEPTH_ANYTHING = Case(
    "DepthAnythingBackbone",
    make_depth_anything,
    **BLOCKS,
    # Each level: a projection, one onto the common size, and in the fusion
    # a projection and two residual parts of two. One level shrinks by a
    # convolution (another grows by a transposed one), and the head has three.
    convolutions=PATCHES + (2 + 5) * LEVELS + 1 + 3,
)
MIT_SIZES = dict(
    image_shape=(32, 32, 3),
    num_layers=2,
    layerwise_depths=[1, 2],
    hidden_dims=[8, 12],
    layerwise_num_heads=[1, 2],
    layerwise_sr_ratios=[2, 1],
    max_drop_path_rate=0.1,
    layerwise_patch_sizes=[7, 3],
    layerwise_strides=[4, 2],
)
MIT_BLOCKS = dict(
    attention=4 * 3,
    mlp=2 * 3,
    # Patches of both stages, what shortens the keys of the first one, and
    # one inside every feed-forward part.
    convolutions=2 + 1 + 3,
)
MIT = backbone("MiTBackbone", MIT_SIZES, **MIT_BLOCKS)


def make_seg_former():
    import keras_hub

    encoder = keras_hub.models.MiTBackbone(**MIT_SIZES)
    return keras_hub.models.SegFormerBackbone(encoder, projection_filters=6)


SEG_FORMER = Case(
    "SegFormerBackbone",
    make_seg_former,
    attention=MIT.attention,
    mlp=MIT.mlp,
    # One linear layer for each stage, and a convolution that fuses them.
    linear=MIT.attention + MIT.mlp + 2,
    convolutions=MIT.convolutions + 1,
)
SWIN = backbone(
    "SwinTransformerBackbone",
    dict(
        image_shape=IMAGE,
        patch_size=2,
        embed_dim=8,
        # Every other block shifts its windows.
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
    ),
    # Queries, keys and values together.
    attention=2 * 4,
    mlp=2 * 4,
    # One merges patches between the stages.
    linear=4 * 4 + 1,
    convolutions=PATCHES,
)


# -- Segment Anything --------------------------------------------------------

VIT_DET_SIZES = dict(
    image_shape=IMAGE,
    patch_size=4,
    hidden_size=16,
    num_layers=LAYERS,
    intermediate_dim=24,
    num_heads=2,
    # The others attend within windows.
    global_attention_layer_indices=[1],
    window_size=2,
    num_output_channels=8,
)
NECK = 2
VIT_DET = backbone(
    "ViTDetBackbone",
    VIT_DET_SIZES,
    # Queries, keys and values together.
    attention=2 * LAYERS,
    mlp=2 * LAYERS,
    convolutions=PATCHES + NECK,
)
DECODER_LAYERS = 2
MASKS = 3


def make_sam():
    import keras_hub

    return keras_hub.models.SAMBackbone(
        keras_hub.models.ViTDetBackbone(**VIT_DET_SIZES),
        keras_hub.layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=12,
        ),
        keras_hub.layers.SAMMaskDecoder(
            num_layers=DECODER_LAYERS,
            hidden_size=8,
            intermediate_dim=20,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=MASKS - 1,
            iou_head_depth=3,
            iou_head_hidden_dim=6,
        ),
    )


# The backbone alone leaves its decoder of masks without weights. Four kinds of
# points have an embedding, and so have none and no mask; three convolutions
# shrink a mask.
SAM = Case(
    "SAMBackbone",
    make_sam,
    attention=VIT_DET.attention,
    mlp=VIT_DET.mlp,
    embeddings=6,
    convolutions=VIT_DET.convolutions + 3,
)
# In each layer of the decoder tokens attend to themselves and to the image,
# and the image to them; a last attention follows. Heads of three layers make
# each mask and score them all.
SAM_ATTENTION = SAM.attention + 4 * (3 * DECODER_LAYERS + 1)
SAM_MLP = SAM.mlp + 2 * DECODER_LAYERS
DECODER = dict(
    attention=SAM_ATTENTION,
    mlp=SAM_MLP,
    linear=SAM_ATTENTION + SAM_MLP + 3 * (MASKS + 1),
    # Tokens of the masks and of their score.
    embeddings=SAM.embeddings + 2,
)


def make_sam3():
    import keras_hub

    width = dict(hidden_dim=16, intermediate_dim=24, num_heads=2)
    layers = keras_hub.layers
    image = dict(image_shape=(32, 32, 3), patch_size=4)
    return keras_hub.models.SAM3PromptableConceptBackbone(
        layers.SAM3VisionEncoder(
            **image,
            **width,
            num_layers=LAYERS,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=IMAGE,
            window_size=4,
            global_attn_indexes=[1],
        ),
        layers.SAM3TextEncoder(
            vocabulary_size=50, embedding_dim=16, num_layers=LAYERS, **width
        ),
        layers.SAM3GeometryEncoder(num_layers=1, roi_size=3, **width),
        layers.SAM3DetrEncoder(num_layers=1, **width),
        layers.SAM3DetrDecoder(**image, num_layers=2, num_queries=7, **width),
        layers.SAM3MaskDecoder(
            num_upsampling_stages=2, hidden_dim=16, num_heads=2
        ),
    )


def one_image(model, rows):
    """keras-hub puts the mask of a row's boxes in place of all rows' masks."""
    return Case("SAM3PromptableConceptBackbone", make_sam3).batch(model, 1)


ONE_IMAGE = "keras-hub masks box prompts right for a single image only"
# Both towers; box prompts and the encoder, whose layers attend to themselves
# and to something else; the decoder, whose layers attend to three things; and
# masks, which attend to the prompt.
SAM3_ATTENTION = 4 * (2 * LAYERS + 2 + 2 + 3 * 2 + 1)
# The last three make embeddings of masks.
SAM3_MLP = 2 * (2 * LAYERS + 1 + 1 + 2) + 3
SAM3 = Case(
    "SAM3PromptableConceptBackbone",
    make_sam3,
    attention=SAM3_ATTENTION,
    mlp=SAM3_MLP,
    linear=SAM3_ATTENTION
    + SAM3_MLP
    # Of box prompts; of the decoder: boxes and presence by three layers each,
    # reference points and two relative positions by two; of the text, alone
    # and for the scores; and of the queries.
    + 3
    + (2 * 3 + 3 * 2)
    + 1
    + (2 + 1)
    + 1,
    # Tokens; labels of boxes and their class; queries, their points, presence.
    embeddings=1 + 2 + 3,
    # Two at each of four levels; regions of boxes; two on the way up through
    # the three levels that masks are made from, and two before the masks.
    convolutions=PATCHES + 2 * 4 + 1 + 2 + 2,
    inputs=one_image,
    unable=dict.fromkeys(("onnx", "onnx int8", "litert"), ONE_IMAGE)
    | {"torch": "keras-hub calls torchvision, which it does not ask for"},
)
NO_FIT = dict(unable={"train": "keras-hub's `fit` refuses this task"})

CASES: tuple[Case, ...] = (
    DEIT,
    task("DeiTImageClassifier", DEIT, {}, **CLASSES),
    DEPTH_ANYTHING,
    task(
        "DepthAnythingDepthEstimator",
        DEPTH_ANYTHING,
        {},
        depth_estimation_type="relative",
    ),
    DINOV2,
    DINOV3,
    MIT,
    task("MiTImageClassifier", MIT, {}, **CLASSES),
    SAM,
    task("SAMImageSegmenter", SAM, DECODER | NO_FIT),
    SAM3,
    task(
        "SAM3PromptableConceptImageSegmenter",
        SAM3,
        dict(unable={**SAM3.unable, **NO_FIT["unable"]}),
    ),
    SEG_FORMER,
    task("SegFormerImageSegmenter", SEG_FORMER, {}, **CLASSES),
    SWIN,
    task("SwinTransformerImageClassifier", SWIN, {}, **CLASSES),
    VIT,
    task("ViTImageClassifier", VIT, {}, **CLASSES),
    VIT_DET,
)
