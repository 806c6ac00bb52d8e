"""Convolutional backbones, detectors and segmenters."""

import numpy as np

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task

ONLY_CONVOLUTIONS = ("convolutions",)


def classifier(name, base, **settings):
    """The classifier on a backbone."""
    return task(name, base, {}, num_classes=3, **settings)


# A block: a shortcut where the size or the width changes, and two 3x3.
RESNET_SETTINGS = dict(
    input_conv_filters=[8, 12],
    input_conv_kernel_sizes=[3, 3],
    stackwise_num_filters=[64, 20],
    stackwise_num_blocks=[1, 2],
    stackwise_num_strides=[1, 2],
    block_type="basic_block_vd",
)
RESNET = backbone(
    "ResNetBackbone",
    RESNET_SETTINGS,
    convolutions=2 + 3 + (3 + 2),
    default=ONLY_CONVOLUTIONS,
)


def encoder(filters, stem=8):
    """A ResNet of one block in each stack, four convolutions and three each."""
    import keras_hub

    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[stem],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=filters,
        stackwise_num_blocks=[1] * len(filters),
        stackwise_num_strides=[1] + [2] * (len(filters) - 1),
        block_type="basic_block_vd",
    )


def _basnet():
    import keras_hub

    return keras_hub.models.BASNetBackbone(
        image_encoder=encoder([64, 6, 8, 10], stem=2),
        num_classes=1,
        projection_filters=2,
    )


BASNET = Case(
    "BASNetBackbone",
    _basnet,
    # The encoder; then a projection, two stacks of three blocks of two, a
    # bridge of three, six stages of three, seven heads; and in the
    # refinement a projection, four stages down, a bridge, four up, a head.
    convolutions=(1 + 4 * 3)
    + (1 + 2 * 3 * 2 + 3 + 6 * 3 + 7)
    + (1 + 4 + 1 + 4 + 1),
    default=ONLY_CONVOLUTIONS,
    idle={r"image_encoder.*conv1_conv": "the encoder's stem is not called"},
)

CSPNET = backbone(
    "CSPNetBackbone",
    dict(
        stem_filters=12,
        stem_kernel_size=3,
        stem_strides=2,
        stackwise_depth=[1, 2],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[16, 24],
        block_type="bottleneck_block",
        stage_type="csp",
        groups=2,
        bottle_ratio=[0.5],
        block_ratio=[0.5],
    ),
    # Down, expand and two transitions of a stage, three of each block.
    convolutions=1 + (4 + 3) + (4 + 2 * 3),
    default=ONLY_CONVOLUTIONS,
)


def _deeplab():
    import keras_hub

    return keras_hub.models.DeepLabV3Backbone(
        image_encoder=encoder([64, 12, 16]),
        spatial_pyramid_pooling_key="P4",
        upsampling_size=4,
        dilation_rates=[2, 3],
        low_level_feature_key="P2",
        projection_filters=6,
    )


DEEPLAB = Case(
    "DeepLabV3Backbone",
    _deeplab,
    # The encoder; of the pyramid one pointwise, two dilated, one pooled, and
    # the projection; the low-level projection; the last one.
    convolutions=(1 + 3 * 3) + (1 + 2 + 1 + 1) + 1 + 1,
    default=ONLY_CONVOLUTIONS,
)

DENSENET = backbone(
    "DenseNetBackbone",
    dict(stackwise_num_repeats=[1, 2], growth_rate=6),
    # Two in a layer, one in the transition between the blocks.
    convolutions=1 + 2 * (1 + 2) + 1,
    default=ONLY_CONVOLUTIONS,
)

EFFICIENTNET = backbone(
    "EfficientNetBackbone",
    dict(
        stackwise_width_coefficients=[1.0] * 4,
        stackwise_depth_coefficients=[1.0] * 4,
        stackwise_kernel_sizes=[3, 5, 3, 3],
        stackwise_num_repeats=[1, 1, 1, 2],
        stackwise_input_filters=[8, 8, 16, 16],
        stackwise_output_filters=[8, 16, 16, 24],
        stackwise_expansion_ratios=[1, 4, 2, 3],
        stackwise_strides=[1, 2, 1, 2],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25, 0.25, 0.25],
        stackwise_block_types=["cba", "v1", "fused", "unfused"],
        dropout=0.0,
    ),
    # Expansion, depthwise, squeeze, excitation, projection; fused: one for
    # the first two.
    convolutions=1 + 1 + 5 + 4 + 2 * 5 + 1,
    default=ONLY_CONVOLUTIONS,
)

HGNET_STAGES = dict(
    stem_channels=[3, 8, 12],
    stackwise_stage_filters=[
        # In, middle, out, blocks, layers of a block, kernel.
        [12, 8, 16, 1, 1, 3],
        [16, 10, 24, 2, 2, 3],
    ],
    apply_downsample=[False, True],
    use_lightweight_conv_block=[False, True],
    depths=[1, 2],
    hidden_sizes=[16, 24],
    embedding_size=12,
    use_learnable_affine_block=True,
    hidden_act="relu",
)
HGNET = backbone(
    "HGNetV2Backbone",
    HGNET_STAGES,
    # The stem; layers and two to aggregate; a depthwise one down, and light
    # layers of two.
    convolutions=5 + (1 + 2) + (1 + 2 * (2 * 2 + 2)),
    default=ONLY_CONVOLUTIONS,
)

MOBILENET = backbone(
    "MobileNetBackbone",
    dict(
        stackwise_expansion=[[16, 32], [32]],
        stackwise_num_blocks=[2, 1],
        stackwise_num_filters=[[8, 16], [16]],
        stackwise_kernel_size=[[3, 3], [5]],
        stackwise_num_strides=[[2, 1], [1]],
        stackwise_se_ratio=[[0.25, None], [0.25]],
        stackwise_activation=[["relu6", "relu6"], ["hard_swish"]],
        stackwise_padding=[[1, 1], [2]],
        output_num_filters=32,
        input_num_filters=8,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=False,
        squeeze_and_excite=0.5,
        last_layer_filter=24,
    ),
    # Two more where a block squeezes and excites.
    convolutions=1 + (2 + 2) + (3 + 2) + 3 + (3 + 2) + 1,
    default=ONLY_CONVOLUTIONS,
)

# One block of each kind: edge residual, inverted residual with all three
# depthwise kernels, attention with one key and value, and with many.
MOBILENET5 = backbone(
    "MobileNetV5Backbone",
    dict(
        stackwise_block_types=[["er"], ["uir", "mqa", "mha"]],
        stackwise_num_blocks=[1, 3],
        stackwise_num_filters=[[16], [24, 24, 24]],
        stackwise_strides=[[2], [2, 1, 1]],
        stackwise_act_layers=[["gelu"], ["gelu", "gelu", "gelu"]],
        stackwise_exp_ratios=[[2.0], [2.0, 0.0, 0.0]],
        stackwise_se_ratios=[[0.0], [0.0, 0.0, 0.0]],
        stackwise_dw_kernel_sizes=[[0], [5, 0, 0]],
        stackwise_dw_start_kernel_sizes=[[0], [3, 0, 0]],
        stackwise_dw_end_kernel_sizes=[[0], [3, 0, 0]],
        stackwise_exp_kernel_sizes=[[3], [0, 0, 0]],
        stackwise_pw_kernel_sizes=[[1], [0, 0, 0]],
        stackwise_num_heads=[[0], [2, 2, 3]],
        stackwise_key_dims=[[0], [0, 6, 8]],
        stackwise_value_dims=[[0], [0, 6, 8]],
        stackwise_kv_strides=[[0], [0, 2, 1]],
        stackwise_use_cpe=[[False], [False, True, False]],
        stem_size=8,
        num_features=20,
        msfa_output_resolution=4,
        # How it comes to that size depends on the size of the image.
        image_shape=(64, 64, 3),
    ),
    # The stem; two; three depthwise and two pointwise; query and output, keys
    # and values each with a depthwise one down, and one for positions; fused
    # and output; two to join the last two stages.
    convolutions=1 + 2 + 5 + (2 + 2 * 2 + 1) + 2 + 2,
    default=ONLY_CONVOLUTIONS,
    unable={
        "tensorflow": "cannot be made: its attention leaves the number of "
        "channels to be inferred"
    },
)

VGG = backbone(
    "VGGBackbone",
    dict(stackwise_num_repeats=[1, 2], stackwise_num_filters=[8, 12]),
    convolutions=1 + 2,
    default=ONLY_CONVOLUTIONS,
)

XCEPTION = backbone(
    "XceptionBackbone",
    dict(
        stackwise_conv_filters=[[8, 12], [16, 16], [16], [20]],
        stackwise_pooling=[False, True, False, False],
    ),
    # Two, then separable ones, and one on the shortcut that changes width.
    convolutions=2 + (2 + 1) + 1 + 1,
    default=ONLY_CONVOLUTIONS,
)


def _retinanet():
    import keras_hub

    return keras_hub.models.RetinaNetBackbone(
        image_encoder=encoder([64, 12, 16, 20]),
        min_level=3,
        max_level=6,
        use_p5=False,
        use_fpn_batch_norm=True,
    )


RETINANET = Case(
    "RetinaNetBackbone",
    _retinanet,
    # The encoder; levels 3 to 5 from the side, levels 3 to 6 out.
    convolutions=(1 + 4 * 3) + 3 + 4,
    default=ONLY_CONVOLUTIONS,
)


def _dfine():
    import keras_hub

    backbone = keras_hub.models.HGNetV2Backbone(
        stem_channels=[3, 8, 12],
        stackwise_stage_filters=[
            [12, 8, 16, 1, 1, 3],
            [16, 10, 24, 1, 2, 3],
            [24, 12, 32, 1, 1, 3],
        ],
        apply_downsample=[False, True, True],
        use_lightweight_conv_block=[False, True, False],
        depths=[1, 1, 1],
        hidden_sizes=[16, 24, 32],
        embedding_size=12,
        use_learnable_affine_block=True,
        hidden_act="relu",
        out_features=["stage2", "stage3"],
    )
    model = keras_hub.models.DFineBackbone(
        backbone=backbone,
        decoder_in_channels=[16, 16],
        encoder_in_channels=[24, 32],
        encoder_hidden_dim=16,
        encode_proj_layers=[1],
        encoder_ffn_dim=20,
        num_encoder_layers=1,
        num_attention_heads=2,
        hidden_expansion=0.5,
        depth_multiplier=0.34,
        hidden_dim=16,
        decoder_ffn_dim=28,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_n_points=[2, 3],
        eval_idx=-1,
        lqe_hidden_dim=10,
        num_lqe_layers=2,
        num_labels=3,
        num_denoising=0,
        learn_initial_query=False,
        # Of many, two have the same score but for rounding, which then decides
        # about their order.
        num_queries=4,
        # Its deformable attention is of images of this one size.
        anchor_image_size=(64, 64),
        image_shape=(64, 64, 3),
        feat_strides=[8, 16],
        num_feature_levels=2,
        out_features=["stage2", "stage3"],
        seed=0,
    )
    # Its kernels start so small that all places of an image look alike, and
    # rounding chooses among them.
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) > 1:
            size = np.sqrt(np.prod(weight.shape[:-1]))
            weight.assign(rng.normal(size=weight.shape) / size)
    return model


# Four convolutions, and twice two and a block of two.
_AGGREGATION = 4 + 2 * (2 + 2)
DFINE = Case(
    "DFineBackbone",
    _dfine,
    # One in the encoder; two in the decoder, where the other attention has
    # sampling offsets and weights.
    attention=4 + 2 * (4 + 2),
    # In the decoder with the gate before it.
    mlp=2 + 2 * (2 + 1),
    # After the encoder one, its boxes three, its classes one; of queries two,
    # of the first boxes three; for each layer of the decoder one for classes,
    # three for boxes and two for their quality.
    linear=(4 + 2 * 6) + (2 + 2 * 3) + (1 + 3 + 1) + (2 + 3) + 2 * (1 + 3 + 2),
    # The stem and three stages; a projection of each of two levels; from the
    # upper to the lower level one, back two.
    convolutions=(5 + (1 + 2) + (1 + 4 + 2) + (1 + 1 + 2))
    + 2
    + (1 + _AGGREGATION)
    + (2 + _AGGREGATION),
    default=("attention", "mlp", "convolutions"),
)


def in_pixels(model, images):
    """Two boxes in each image by their corners, and their classes."""
    corners = np.array([[4, 4, 20, 24], [10, 30, 50, 60]], "float32")
    return _labelled(images, corners)


def in_shares(model, images):
    """The same by their centers and sizes, as shares of the image."""
    centers = np.array([[0.2, 0.2, 0.2, 0.3], [0.5, 0.7, 0.6, 0.5]], "float32")
    return _labelled(images, centers)


def _labelled(images, boxes):
    rows = len(images)
    labels = np.tile(np.array([0, 2], "int32"), (rows, 1))
    return {"boxes": np.tile(boxes, (rows, 1, 1)), "labels": labels}


CASES: tuple[Case, ...] = (
    RESNET,
    classifier("ResNetImageClassifier", RESNET),
    BASNET,
    task("BASNetImageSegmenter", BASNET, {}),
    CSPNET,
    classifier("CSPNetImageClassifier", CSPNET),
    DEEPLAB,
    task("DeepLabV3ImageSegmenter", DEEPLAB, {}, num_classes=3),
    DENSENET,
    classifier("DenseNetImageClassifier", DENSENET),
    EFFICIENTNET,
    classifier("EfficientNetImageClassifier", EFFICIENTNET),
    HGNET,
    classifier("HGNetV2ImageClassifier", HGNET),
    MOBILENET,
    classifier("MobileNetImageClassifier", MOBILENET),
    MOBILENET5,
    classifier("MobileNetV5ImageClassifier", MOBILENET5),
    VGG,
    classifier("VGGImageClassifier", VGG, pooling_hidden_dim=16),
    XCEPTION,
    classifier("XceptionImageClassifier", XCEPTION),
    RETINANET,
    task(
        "RetinaNetObjectDetector",
        RETINANET,
        dict(labels=in_pixels),
        num_classes=3,
        pre_logits_num_conv_layers=1,
        # Without it the head's first steps turn its activations off.
        use_prediction_head_norm=True,
    ),
    DFINE,
    task("DFineObjectDetector", DFINE, dict(labels=in_shares), num_classes=3),
)
