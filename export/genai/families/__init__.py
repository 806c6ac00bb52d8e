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


def describe(model: keras.Model) -> Decoder:
    """A keras-hub CausalLM as a decoder.

    Raises:
        ValueError: If no family describes its backbone.
    """
    backbone = getattr(model, "backbone", None)
    kind = layer_tree.base_class(backbone).__name__ if backbone else None
    if kind not in FAMILIES:
        raise ValueError(
            "No description for this architecture, which says where a "
            "backbone keeps its projections, norms and tables. Those which "
            f"exist are for {sorted(FAMILIES)}; another is one file in "
            "`keras_peft/export/genai/families/` with a function "
            "`describe(backbone, reader)` that returns a `Decoder`, and one "
            "line in its `FAMILIES`. Until then, `keras_peft.export.to_onnx` "
            "exports it without a cache. "
            f"Received: {type(model).__name__} with backbone={kind}"
        )
    family = importlib.import_module(f"{__name__}.{FAMILIES[kind]}")
    return family.describe(backbone, Reader(model))
