"""Keras models as decoders: one short file for each family."""

import importlib

import keras

from keras_peft import layer_tree
from keras_peft.export.genai.decoder import Decoder
from keras_peft.export.genai.reader import Reader

# By the name of the backbone's class: the file that describes it.
FAMILIES = {
    "BloomBackbone": "bloom",
    "FalconBackbone": "falcon",
    "GPT2Backbone": "gpt2",
    "GPTNeoXBackbone": "gpt_neo_x",
    "Gemma3Backbone": "gemma3",
    "GemmaBackbone": "gemma",
    "GptOssBackbone": "gpt_oss",
    "Llama3Backbone": "llama",
    "LlamaBackbone": "llama",
    "MistralBackbone": "mistral",
    "MixtralBackbone": "mixtral",
    "OPTBackbone": "opt",
    "Phi3Backbone": "phi3",
    "Qwen3Backbone": "qwen3",
    "Qwen3MoeBackbone": "qwen3_moe",
    "QwenBackbone": "qwen",
    "QwenMoeBackbone": "qwen_moe",
    "SmolLM3Backbone": "smollm3",
}


def is_described(model: keras.Model) -> bool:
    """Whether a family describes its backbone."""
    return _kind(model) in FAMILIES


def describe(model: keras.Model) -> Decoder:
    """A keras-hub CausalLM as a decoder.

    Raises:
        ValueError: If no family describes its backbone.
    """
    if not is_described(model):
        raise undescribed(model)
    family = importlib.import_module(f"{__name__}.{FAMILIES[_kind(model)]}")
    return family.describe(model.backbone, Reader(model))


def undescribed(model: keras.Model, besides: str = "") -> ValueError:
    """What to raise for another family; `besides` says more of the model."""
    return ValueError(
        "No description for this architecture, which says where a backbone "
        "keeps its projections, norms and tables. Those which exist are for "
        f"{sorted(FAMILIES)}; another is one file in "
        "`keras_peft/export/genai/families/` with a function "
        "`describe(backbone, reader)` that returns a `Decoder`, and one line "
        f"in its `FAMILIES`.{besides} `keras_peft.export.to_onnx` exports it "
        "without a cache. "
        f"Received: {type(model).__name__} with backbone={_kind(model)}"
    )


def _kind(model: keras.Model) -> str:
    backbone = getattr(model, "backbone", None)
    return layer_tree.base_class(backbone).__name__ if backbone else "None"
