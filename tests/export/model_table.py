"""Small random models of every kind that the exporter promises to take."""

import os
import warnings

import keras
import keras_hub
import numpy as np

TEXT = {
    "vocabulary_size": 1000,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "max_sequence_length": 64,
}
DECODER = {
    "vocabulary_size": 1000,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 64,
    "intermediate_dim": 128,
}


def _jitter(model, seed=0):
    """Moves every all-zero and all-one weight, so that none drops out."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        if value.dtype.kind == "f" and np.all(value == value.flat[0]):
            noise = rng.uniform(0.05, 0.3, value.shape)
            weight.assign(value + noise.astype(value.dtype))
    return model


def bert():
    return keras_hub.models.BertBackbone(**TEXT)


def bert_classifier():
    return keras_hub.models.BertTextClassifier(
        backbone=bert(), num_classes=3, preprocessor=None
    )


def bert_masked_lm():
    return keras_hub.models.BertMaskedLM(backbone=bert(), preprocessor=None)


def roberta():
    return keras_hub.models.RobertaBackbone(**TEXT)


def distil_bert():
    return keras_hub.models.DistilBertBackbone(**TEXT)


def gpt2():
    backbone = keras_hub.models.GPT2Backbone(**TEXT)
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def llama():
    backbone = keras_hub.models.LlamaBackbone(**DECODER)
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def mistral():
    return keras_hub.models.MistralBackbone(**DECODER, sliding_window=8)


def gemma():
    backbone = keras_hub.models.GemmaBackbone(**DECODER, head_dim=16)
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


def t5():
    return keras_hub.models.T5Backbone(
        vocabulary_size=1000,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
    )


def whisper():
    return keras_hub.models.WhisperBackbone(
        vocabulary_size=1000,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        max_encoder_sequence_length=64,
        max_decoder_sequence_length=64,
    )


def vit_classifier():
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
    )
    return keras_hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=5, preprocessor=None
    )


def resnet_classifier():
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(None, None, 3),
    )
    return keras_hub.models.ResNetImageClassifier(
        backbone=backbone, num_classes=5, preprocessor=None
    )


def efficient_net():
    return keras_hub.models.EfficientNetBackbone(
        stackwise_width_coefficients=[1.0, 1.0],
        stackwise_depth_coefficients=[1.0, 1.0],
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16],
        stackwise_expansion_ratios=[1, 4],
        stackwise_strides=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_block_types=["v1", "v1"],
        stackwise_force_input_filters=[0, 0],
        stackwise_nores_option=[False, False],
        image_shape=(None, None, 3),
    )


def mobile_net():
    return keras_hub.models.MobileNetBackbone(
        stackwise_expansion=[[16, 32], [32]],
        stackwise_num_blocks=[2, 1],
        stackwise_num_filters=[[8, 16], [16]],
        stackwise_kernel_size=[[3, 3], [5]],
        stackwise_num_strides=[[2, 1], [1]],
        stackwise_se_ratio=[[0.25, None], [0.25]],
        stackwise_activation=[["relu6", "relu6"], ["hard_swish"]],
        stackwise_padding=[[1, 1], [2]],
        output_num_filters=32,
        input_activation="hard_swish",
        output_activation="hard_swish",
        input_num_filters=8,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=False,
        squeeze_and_excite=0.5,
        last_layer_filter=32,
        image_shape=(32, 32, 3),
    )


def siglip():
    vision = keras_hub.models.SigLIPVisionEncoder(
        patch_size=8,
        hidden_dim=64,
        num_layers=2,
        num_heads=4,
        intermediate_dim=128,
        image_shape=(32, 32, 3),
    )
    text = keras_hub.models.SigLIPTextEncoder(
        vocabulary_size=1000,
        embedding_dim=64,
        hidden_dim=64,
        num_layers=2,
        num_heads=4,
        intermediate_dim=128,
        max_sequence_length=64,
    )
    return keras_hub.models.SigLIPBackbone(vision, text)


def clip():
    vision = keras_hub.models.CLIPVisionEncoder(
        patch_size=8,
        hidden_dim=64,
        num_layers=2,
        num_heads=4,
        intermediate_dim=128,
        image_shape=(32, 32, 3),
    )
    text = keras_hub.models.CLIPTextEncoder(
        vocabulary_size=1000,
        embedding_dim=64,
        hidden_dim=64,
        num_layers=2,
        num_heads=4,
        intermediate_dim=128,
        max_sequence_length=64,
    )
    return keras_hub.models.CLIPBackbone(vision, text, projection_dim=32)


def sam():
    image_encoder = keras_hub.models.ViTDetBackbone(
        hidden_size=16,
        num_layers=2,
        intermediate_dim=16 * 4,
        num_heads=2,
        global_attention_layer_indices=[1],
        patch_size=16,
        num_output_channels=8,
        window_size=2,
        image_shape=(64, 64, 3),
    )
    prompt_encoder = keras_hub.layers.SAMPromptEncoder(
        hidden_size=8,
        image_embedding_size=(4, 4),
        input_image_size=(64, 64),
        mask_in_channels=16,
    )
    mask_decoder = keras_hub.layers.SAMMaskDecoder(
        num_layers=2,
        hidden_size=8,
        intermediate_dim=32,
        num_heads=2,
        embedding_dim=8,
        num_multimask_outputs=3,
        iou_head_depth=2,
        iou_head_hidden_dim=8,
    )
    return keras_hub.models.SAMBackbone(
        image_encoder, prompt_encoder, mask_decoder
    )


def text_tower():
    """A user's functional model with one layer of each common kind."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    features = keras.Input((None, 8), name="features")
    x = keras.layers.Embedding(50, 16)(ids)
    x = x + keras.layers.Dense(16, activation="gelu")(features)
    x = x + keras.layers.MultiHeadAttention(2, 8)(x, x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Conv1D(16, 3, padding="same", activation="relu")(x)
    x = keras.layers.EinsumDense(
        "btd,dhk->bthk", output_shape=(None, 2, 8), bias_axes="hk"
    )(x)
    x = keras.layers.Reshape((-1, 16))(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    scores = keras.layers.Dense(3, name="scores")(x)
    return keras.Model([ids, features], [scores, keras.ops.softmax(scores)])


def lstm():
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Embedding(50, 16)(ids)
    x = keras.layers.LSTM(16)(x)
    return keras.Model(ids, keras.layers.Dense(3)(x))


def sequential():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(8, 3, strides=2),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.Flatten(),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Two inputs in a dictionary, two outputs in another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left = keras.layers.Dense(8, activation="tanh")
        self.right = keras.layers.Dense(8)

    def call(self, inputs):
        total = self.left(inputs["a"]) + self.right(inputs["b"])
        return {"total": total, "mean": keras.ops.mean(total, axis=-1)}


def subclassed():
    model = Subclassed()
    model({"a": np.ones((2, 4), "float32"), "b": np.ones((2, 6), "float32")})
    return model


@keras.saving.register_keras_serializable("tests")
class NotTraceableByTorch(keras.layers.Layer):
    """A layer that torch's exporter cannot look into."""

    def call(self, inputs):
        if keras.config.backend() == "torch":
            import torch

            if torch.compiler.is_exporting():
                raise NotImplementedError("this layer is opaque to torch")
        return inputs + 1.0


@keras.saving.register_keras_serializable("tests")
class OwnToTheProcess(keras.layers.Layer):
    """A layer that computes something else in every process."""

    def call(self, inputs):
        return inputs + float(os.getpid() % 1000)


def with_layer(layer):
    """A model around one of the two."""
    inputs = keras.Input((6,), name="features")
    return keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))


def make(name):
    """A new model of the table, all weights random."""
    with warnings.catch_warnings():
        # keras-hub's T5 hands masks to layers that do not take them.
        warnings.simplefilter("ignore")
        return _jitter(globals()[name]())


QUICK = ("bert_classifier", "text_tower", "sequential")
SLOW = (
    "bert",
    "bert_masked_lm",
    "roberta",
    "distil_bert",
    "gpt2",
    "llama",
    "mistral",
    "gemma",
    "t5",
    "whisper",
    "vit_classifier",
    "resnet_classifier",
    "efficient_net",
    "mobile_net",
    "siglip",
    "clip",
    "sam",
    "lstm",
    "subclassed",
)
