"""What keras-hub dropped when it converted a Hugging Face model."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
from keras import ops

from keras_peft import layer_tree
from keras_peft.check_tokenizer import compare_tokenizer
from keras_peft.finding import IN_MEMORY
from keras_peft.finding import Finding
from keras_peft.finding import report
from keras_peft.hf_names import Names

# The settings of Hugging Face models that name the same thing.
_ACTIVATIONS = (
    *("hidden_activation", "hidden_act", "activation_function", "activation"),
)
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
# What keras-hub calls them.
_EPSILON_SETTINGS = ("layer_norm_epsilon", "rms_norm_eps")

# What keras-hub computes where no layer holds the function.
_HARD_CODED = {
    "gemma": "gelu_pytorch_tanh",
    "gemma3": "gelu_pytorch_tanh",
    "smollm3": "silu",
}
# What the usual checkpoints of a family say and keras-hub drops.
_USUAL: dict[str, dict[str, Any]] = {
    "bert": {"hidden_act": "gelu"},
    "llama3": {"rms_norm_eps": 1e-5},
}
# Weights of heads, and of poolers, belong to no backbone.
_HEADS = (
    *("lm_head", "cls.", "classifier", "pre_classifier", "score", "vocab_"),
    *("qa_outputs", "pooler", "contact_head"),
)


# What a converter adds to another weight.
_FOLDED = {"xlm_roberta": ("token_type_embeddings", "position_embeddings")}


def check_base(
    model: keras.Model, hf_folder: str | Path, mend: bool = False
) -> list[str]:
    """Tells what `model` does otherwise than the Hugging Face model it is of.

    keras-hub converts a model's weights, and not all of its settings: it may
    compute another activation function, other epsilons in its norms, or other
    ids of a text. An adapter then meets a slightly different base than the
    one it was trained on. Compared are activations, epsilons, all weights, and
    of the preprocessor the ids of many texts, the tokens that start, end and
    pad a text, what it does with accents, and the chat template.

    Args:
        model: A model or backbone of keras-hub, adapted or not.
        hf_folder: The Hugging Face folder it was converted from, with
            `config.json`. Its weights are compared if they are there as
            safetensors, and its tokenizer if there is a `tokenizer.json`.
        mend: Whether to make the model, in place, do as the folder says:
            epsilons, activations, accents, and a preprocessor that runs the
            folder's tokenizer (`HuggingFaceTokenizer`), which carries the chat
            template as `model.preprocessor.tokenizer.chat_template`. Weights
            stay as they are. Mend before training.

    Returns:
        One sentence for each difference that was found, which says if it was
        mended; an empty list if there is none.

    Raises:
        ValueError: if the folder has no `config.json`, or keras-hub no
            converter for the family. Nothing is mended then.

    Example:
    >>> model = keras_hub.models.CausalLM.from_preset("hf-model/")
    >>> keras_peft.check_base(model, "hf-model/", mend=True)
    """
    folder = Path(hf_folder)
    config = _json(folder / "config.json")
    if config is None:
        raise ValueError(
            "Expected the folder of a Hugging Face model, with `config.json`. "
            f"Received: hf_folder={str(hf_folder)!r}"
        )
    names = Names(model)
    findings = [
        *_settings(names, config),
        *map(Finding, _compare_weights(names, folder)),
        *compare_tokenizer(model, folder),
    ]
    told = report(findings, mend)
    if mend:
        layer_tree.forget_compiled(model, optimizer=False)
    return told


def warn_of_base(names: Names, name_or_path: str | None) -> None:
    """Warns where the base of a PEFT adapter differs from the model."""
    path = Path(str(name_or_path)) / "config.json"
    config = _json(path) if name_or_path else None
    if config is None:
        found = compare_settings(names, _USUAL.get(names.family, {}))
        source = "most models of this family"
    else:
        found = compare_settings(names, config)
        source = f"`{path.parent}`"
        if quantization := config.get("quantization_config"):
            kind = quantization.get("quant_method", "quantized")
            found.append(f"there the base is quantized ({kind})")
    if found:
        warnings.warn(
            "The base of the adapter differs from this model: "
            f"{'; '.join(found)} (compared with {source}). Outputs differ by "
            "as much. `keras_peft.check_base(model, hf_folder)` compares "
            "with a folder.",
            stacklevel=4,
        )


def compare_settings(names: Names, config: dict[str, Any]) -> list[str]:
    """What the settings of a Hugging Face model say otherwise."""
    return report(_settings(names, config), mend=False)


def _settings(names: Names, config: dict[str, Any]) -> list[Finding]:
    # Multimodal models keep their language model's settings apart.
    config = {**config, **config.get("text_config", {})}
    return [
        *_compare_activations(names, config),
        *_compare_epsilons(names, config),
    ]


def _json(path):
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


# -- Activations -------------------------------------------------------------


def _compare_activations(names, config):
    key = next((key for key in _ACTIVATIONS if config.get(key)), None)
    theirs = _FUNCTIONS.get(config.get(key))
    if theirs is None:
        return
    for path, ours in _activations(names):
        apart = _distance(ours, theirs)
        if apart > 1e-5:  # A few roundings of numbers up to 4.
            yield Finding(
                f"`{key}={config[key]!r}` there, and `{path}` computes "
                f"another function, up to {apart:.1e} apart",
                _activation_mend(names, theirs),
                IN_MEMORY,
            )
            return


def _distance(ours, theirs):
    grid = ops.linspace(-4.0, 4.0, 161)
    apart = ops.convert_to_numpy(ours(grid) - theirs(grid))
    return float(np.abs(apart).max())


def _activation_mend(names, theirs):
    """Sets the function where layers hold it; `None` if none does."""
    layers = [layer for _, layer in layer_tree.walk(names.backbone)]
    # An adapted layer's function stands behind its adapters.
    if names.family in _HARD_CODED or any(map(layer_tree.is_adapted, layers)):
        return None

    def mend():
        for _, layer, attribute in _holders(names.backbone):
            if _distance(getattr(layer, attribute), theirs) > 1e-5:
                setattr(layer, attribute, theirs)

    return mend


def _holders(backbone):
    """`(path, layer, attribute)` of feed-forward layers' activations."""
    for path, layer in layer_tree.walk(backbone):
        if "pool" in path:
            continue  # Its tanh is no setting.
        held = getattr(layer, "after_kernel", {}).get("activation")
        for attribute in ("activation", "hidden_activation"):
            found = held or getattr(layer, attribute, None)
            if found not in (None, keras.activations.linear):
                yield path, layer, attribute


def _activations(names: Names) -> Iterator[tuple[str, Any]]:
    """`(path, function)` of the feed-forward layers' activations."""
    if names.family in _HARD_CODED:
        yield names.backbone.name, _FUNCTIONS[_HARD_CODED[names.family]]
    for path, layer, attribute in _holders(names.backbone):
        held = getattr(layer, "after_kernel", {}).get("activation")
        yield path, keras.activations.get(held or getattr(layer, attribute))


def _gelu_tanh(x):
    return keras.activations.gelu(x, approximate=True)


def _quick_gelu(x):
    return x * ops.sigmoid(1.702 * x)


# By the names of transformers.
_FUNCTIONS = {
    "gelu": keras.activations.gelu,
    "gelu_python": keras.activations.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": keras.activations.relu,
    "silu": keras.activations.silu,
    "swish": keras.activations.silu,
    "tanh": keras.activations.tanh,
}

# -- Epsilons ----------------------------------------------------------------


def _compare_epsilons(names, config):
    key = next((key for key in _EPSILONS if key in config), None)
    if key is None:
        return
    norms = {
        path: layer
        for path, layer in layer_tree.walk(names.backbone)
        if getattr(layer, "epsilon", None) is not None
    }
    others = {
        path: layer.epsilon
        for path, layer in norms.items()
        if not np.isclose(layer.epsilon, config[key])
    }
    if others:
        path, epsilon = next(iter(others.items()))
        mend, kept = _epsilon_mend(names.backbone, others, config[key])
        yield Finding(
            f"`{key}={config[key]}` there, and {len(others)} of {len(norms)} "
            f"norms have another, `{path}` {epsilon}",
            mend,
            "mended" if kept else IN_MEMORY,
        )


def _epsilon_mend(backbone, others, epsilon):
    """What sets epsilons, and whether a saved model keeps them."""
    layers = layer_tree.layers_by_path(backbone)
    # What the backbone, and each block, made its norms with.
    settings = [
        (layer, name)
        for layer in layers.values()
        for name in _EPSILON_SETTINGS
        if getattr(layer, name, None) in others.values()
    ]

    def mend():
        for path in others:
            layers[path].epsilon = epsilon
        for layer, name in settings:
            setattr(layer, name, epsilon)

    return mend, any(layer is backbone for layer, _ in settings)


# -- Weights -----------------------------------------------------------------


def _compare_weights(names, folder):
    """Reads one tensor after the other: a whole model may not fit twice."""
    differ: dict[str, float] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            for key in opened.keys():
                if any(part in key for part in _FOLDED.get(names.family, ())):
                    continue
                found, tensor = _ported(names, key), opened.get_tensor(key)
                if not found and _matters(key, tensor):
                    yield f"`{key}` there has no place in the model"
                apart = max((_apart(each, tensor) for each in found), default=0)
                if apart > 1e-6:
                    differ[key] = apart
    if differ:
        key = max(differ, key=lambda key: differ[key])
        yield (
            f"{len(differ)} weights have other values, `{key}` by "
            f"{differ[key]:.1e} of its largest"
        )


def _ported(names, key):
    module, _, parameter = key.rpartition(".")
    module = names.find(module)
    ported = names.tensors.get(f"{module}.{parameter}", [])
    return [each for _, each in ported]


def _matters(key, tensor):
    head = any(part in key for part in _HEADS)
    return not head and tensor.dtype.kind == "f" and bool(tensor.any())


def _apart(ported, tensor):
    ours = ops.convert_to_numpy(ops.cast(ported.variable, "float32"))
    theirs = ported.of(tensor.astype("float32"))
    if theirs is None:
        return float("inf")
    largest = float(np.abs(theirs).max()) or 1.0
    return float(np.abs(ours - theirs).max()) / largest
