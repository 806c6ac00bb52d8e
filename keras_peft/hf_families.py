"""What is particular to families of models, at Hugging Face and in keras-hub.

Little: names of weights and their layouts come from keras-hub's converters.
"""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import keras

from keras_peft import layer_tree

# What a HF class with a head puts before its backbone's modules, where that is
# neither `model` nor the name of keras-hub's converter.
_PREFIXES = {
    "gpt2": "transformer",
    "swin_transformer": "swin",
    "xlm_roberta": "roberta",
}
_NAMED_AFTER_FAMILY = (
    *("albert", "bert", "deit", "dinov2", "distilbert", "esm", "roberta"),
    "vit",
)

# transformers 5 renamed modules of these families, but not the tensors of its
# files, whose names the converters know.
_ATTENTION = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
_FEED_FORWARD = (
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_VIT = (("encoder.layer.", "layers."), *_ATTENTION, *_FEED_FORWARD)
_RENAMED = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _ATTENTION,
    "dinov3": (("layer.", "model.layer."),),
    "swin_transformer": (*_ATTENTION, *_FEED_FORWARD),
}

# The modules of a HF classifier's head, by the attributes of keras-hub's.
_HEADS = {
    "distilbert": {
        "pooled_dense": "pre_classifier",
        "output_dense": "classifier",
    },
    **dict.fromkeys(
        ("roberta", "xlm_roberta"),
        {
            "pooled_dense": "classifier.dense",
            "output_dense": "classifier.out_proj",
        },
    ),
}
_HEAD = {"output_dense": "classifier"}


def prefix_of(family: str) -> str:
    """What a HF class with a head puts before its backbone's modules."""
    named = family in _NAMED_AFTER_FAMILY
    return _PREFIXES.get(family, family if named else "model")


def renamed(family: str, module: str) -> str:
    """A module as transformers 5 calls it."""
    for old, new in _RENAMED.get(family, ()):
        module = module.replace(old, new)
    return module


def head_modules(model: keras.Layer, family: str) -> dict[int, str]:
    """`{id(layer): module}` of a classifier's head."""
    import keras_hub

    models = keras_hub.models
    if not isinstance(model, models.TextClassifier | models.ImageClassifier):
        return {}
    return {
        id(getattr(model, attribute)): module
        for attribute, module in _HEADS.get(family, _HEAD).items()
        if getattr(model, attribute, None) is not None
    }


def backbone_of(
    model: keras.Layer, layers: Iterable[keras.Layer]
) -> keras.Model:
    """The keras-hub backbone among a model and its layers."""
    import keras_hub

    kind = keras_hub.models.Backbone
    found = [la for la in (model, *layers) if isinstance(la, kind)]
    if not found:
        raise ValueError(
            "Hugging Face names are known for the models of keras-hub, but "
            f"`{model.name}` holds no backbone of it. Use `format='keras'`. "
            f"Received: {type(model).__name__}"
        )
    return found[0]


def converter_of(backbone: keras.Model) -> ModuleType:
    """keras-hub's converter for the class of a backbone."""
    from keras_hub.src.utils.transformers import preset_loader

    converters = [
        module
        for name, module in vars(preset_loader).items()
        if name.startswith("convert_") and hasattr(module, "backbone_cls")
    ]
    own = layer_tree.base_class(backbone)
    for fits in (
        lambda cls: cls is own,
        # Llama 2 has the weights of Llama 3, and no converter of its own.
        lambda cls: issubclass(cls, own),
    ):
        for converter in converters:
            if fits(converter.backbone_cls):
                return converter
    families = ", ".join(c.backbone_cls.__name__ for c in converters)
    raise ValueError(
        "keras-hub has no converter between this family and Hugging Face, so "
        "its names there are unknown. Use `format='keras'`. Families with "
        f"one: {families}. Received: {own.__name__}"
    )


def task_of(model: keras.Layer) -> tuple[bool, str | None]:
    """`(whether the HF class for it has a head, PEFT's `task_type`)`."""
    import keras_hub

    models = keras_hub.models
    for kind, task in (
        # keras-hub's `Seq2SeqLM` is a `CausalLM` too.
        (models.Seq2SeqLM, "SEQ_2_SEQ_LM"),
        (models.CausalLM, "CAUSAL_LM"),
        (models.TextClassifier, "SEQ_CLS"),
        (models.ImageClassifier, None),
    ):
        if isinstance(model, kind):
            return True, task
    return False, None


def config_for(family: str, backbone: keras.Model) -> dict[str, Any]:
    """What converters look up in a Hugging Face config, from the backbone."""
    config = {
        "n_embd": getattr(backbone, "hidden_dim", None),
        "position_embedding_type": getattr(
            backbone, "position_embedding_type", None
        ),
        "emb_layer_norm_before": getattr(backbone, "use_pre_layer_norm", False),
        "model_type": family,
    }
    if family == "gemma" and getattr(backbone, "use_post_ffw_norm", False):
        config["model_type"] = "gemma2"
    if family == "gemma3" and getattr(backbone, "vision_encoder", 1) is None:
        config["model_type"] = "gemma3_text"
    return config
