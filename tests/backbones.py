"""A tiny backbone of every family with transformer blocks."""

import dataclasses
import warnings
from typing import Any

import keras
import numpy as np

_SIZES = dict(
    vocabulary_size=20, num_layers=2, hidden_dim=8, intermediate_dim=12
)
_HEADS = _SIZES | dict(num_heads=2)
_ENCODER = _HEADS | dict(dropout=0.0, max_sequence_length=8)
_GROUPED = _SIZES | dict(num_query_heads=2, num_key_value_heads=1)
_IMAGE = dict(
    image_shape=(8, 8, 3),
    patch_size=4,
    num_layers=2,
    num_heads=2,
    hidden_dim=8,
)
_IMAGE_MLP = _IMAGE | dict(intermediate_dim=12)
_DINO = _IMAGE_MLP | dict(position_embedding_shape=(8, 8, 3))


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A family of keras-hub, and what its architecture says of its blocks."""

    name: str
    settings: dict[str, Any]
    blocks: int = 2
    cross: int = 0  # Blocks with a second attention, to an encoder.
    inputs: int = 1  # Layers that begin a feed-forward part: 2 with a gate.
    width: int = 12  # What the feed-forward part ends with.
    fused: bool = False  # Query, key and value by one layer.
    experts: bool = False  # A bank of raw weights as feed-forward part.
    # Linear layers of other roles, by the last part of their paths.
    others: tuple[str, ...] = ()

    def build(self, **settings):
        import keras_hub
        from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder
        from keras_hub.src.models.clip.clip_vision_encoder import (
            CLIPVisionEncoder,
        )
        from keras_hub.src.models.siglip.siglip_vision_encoder import (
            SigLIPVisionEncoder,
        )

        encoders = (CLIPTextEncoder, CLIPVisionEncoder, SigLIPVisionEncoder)
        found = {kind.__name__: kind for kind in encoders}
        kind = found.get(self.name) or getattr(keras_hub.models, self.name)
        with warnings.catch_warnings():
            # T5's attention says that it takes no implicit masks.
            warnings.simplefilter("ignore", UserWarning)
            return kind(**self.settings | settings)


def _gated(name, **settings):
    return Backbone(name, _GROUPED | settings, inputs=2)


def _experts(name, *others, **settings):
    settings = _GROUPED | dict(num_experts=2) | settings
    return Backbone(name, settings, experts=True, others=others)


BACKBONES = {
    "bert": Backbone("BertBackbone", _ENCODER),
    "roberta": Backbone("RobertaBackbone", _ENCODER),
    "albert": Backbone(
        "AlbertBackbone", _ENCODER | dict(embedding_dim=4), blocks=1
    ),
    "distilbert": Backbone("DistilBertBackbone", _ENCODER),
    "deberta-v3": Backbone("DebertaV3Backbone", _ENCODER | dict(bucket_size=4)),
    "electra": Backbone(
        "ElectraBackbone",
        {k: v for k, v in _ENCODER.items() if k != "vocabulary_size"}
        | dict(embedding_dim=4, vocab_size=20),
    ),
    "esm": Backbone("ESMBackbone", _ENCODER),
    "xlnet": Backbone("XLNetBackbone", _HEADS, others=("_encoding_dense",)),
    "roformer-v2": Backbone("RoformerV2Backbone", _HEADS | dict(head_size=4)),
    "t5": Backbone("T5Backbone", _HEADS, blocks=4, cross=2, inputs=2),
    "bart": Backbone("BartBackbone", _ENCODER, blocks=4, cross=2),
    "whisper": Backbone(
        "WhisperBackbone",
        _HEADS
        | dict(
            num_mels=4,
            max_encoder_sequence_length=8,
            max_decoder_sequence_length=8,
        ),
        blocks=4,
        cross=2,
    ),
    "gpt2": Backbone("GPT2Backbone", _ENCODER),
    "opt": Backbone("OPTBackbone", _ENCODER),
    "bloom": Backbone("BloomBackbone", _HEADS),
    "gpt-neox": Backbone(
        "GPTNeoXBackbone", _HEADS | dict(rotary_percentage=0.5), fused=True
    ),
    "falcon": Backbone("FalconBackbone", _SIZES | dict(num_attention_heads=2)),
    "llama": _gated("LlamaBackbone"),
    "llama3": _gated("Llama3Backbone"),
    "mistral": _gated("MistralBackbone"),
    "phi3": _gated("Phi3Backbone"),
    "qwen": _gated("QwenBackbone"),
    "qwen3": _gated("Qwen3Backbone", head_dim=6),
    # Gemma counts gate and input together.
    "gemma": _gated("GemmaBackbone", head_dim=6, intermediate_dim=24),
    "gemma3": _gated(
        "Gemma3Backbone", head_dim=6, image_size=None, intermediate_dim=12
    ),
    "smollm3": Backbone(
        "SmolLM3Backbone",
        _SIZES
        | dict(
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=False,
            attention_dropout=0.0,
            rope_layer_enabled_list=[True, True],
            layer_types=["full_attention"] * 2,
            mlp_bias=False,
            layer_norm_epsilon=1e-6,
            max_position_embeddings=8,
            rope_theta=10000.0,
            partial_rotary_factor=1.0,
        ),
        inputs=2,
    ),
    "mixtral": _experts("MixtralBackbone", "_sparse_feedforward_gate_dense"),
    "qwen-moe": _experts(
        "QwenMoeBackbone",
        "_sparse_feedforward_gate_dense",
        "_feedforward_intermediate_dense",
        "_feedforward_gate_dense",
        "_feedforward_output_dense",
        "shared_expert_gate_dense",
        top_k=2,
        moe_intermediate_dim=10,
        shared_expert_intermediate_dim=14,
    ),
    "gpt-oss": _experts("GptOssBackbone", "router_dense"),
    "vit": Backbone("ViTBackbone", _IMAGE | dict(mlp_dim=12)),
    "deit": Backbone("DeiTBackbone", _IMAGE_MLP),
    "dinov2": Backbone("DINOV2Backbone", _DINO),
    # A gate beside the input in one kernel, of two thirds of the size.
    "dinov2-swiglu": Backbone(
        "DINOV2Backbone", _DINO | dict(use_swiglu_ffn=True), width=8
    ),
    "dinov3": Backbone("DINOV3Backbone", _IMAGE_MLP),
    "dinov3-gated": Backbone(
        "DINOV3Backbone", _IMAGE_MLP | dict(use_gated_mlp=True), inputs=2
    ),
    # With a pooling head by attention, which is no block.
    "siglip-vision": Backbone(
        "SigLIPVisionEncoder",
        _IMAGE_MLP,
        others=(
            "head.attention.query_dense",
            "head.attention.key_dense",
            "head.attention.value_dense",
            "head.attention.output_dense",
            "head.mlp.fc1",
            "head.mlp.fc2",
        ),
    ),
    "clip-vision": Backbone("CLIPVisionEncoder", _IMAGE_MLP),
    "clip-text": Backbone(
        "CLIPTextEncoder",
        _HEADS | dict(embedding_dim=8, max_sequence_length=8),
    ),
}


def inputs(model, samples=2, tokens=6):
    """Random inputs for a backbone, with a padded row where it takes a mask."""
    rng = np.random.default_rng(3)

    def of(spec):
        shape = [tokens if n is None else n for n in spec.shape[1:]]
        name = spec.name
        if name.endswith("padding_mask"):
            mask = np.ones((samples, *shape), "int32")
            mask[0, tokens - 2 :] = 0
            return mask
        if name.endswith("segment_ids"):
            return np.zeros((samples, *shape), "int32")
        if name.endswith("token_ids"):
            return rng.integers(1, 20, (samples, *shape)).astype("int32")
        return rng.normal(size=(samples, *shape)).astype("float32")

    return keras.tree.map_structure(of, model.input)


def outputs(model, given):
    """What a backbone computes, as one float32 array."""
    found = keras.tree.flatten(model(given, training=False))
    return np.concatenate(
        [keras.ops.convert_to_numpy(o).ravel() for o in found]
    )
