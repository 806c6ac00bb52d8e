"""The Hugging Face names of a model's layers and weights."""

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import keras
import numpy as np

from keras_peft import layer_tree
from keras_peft.hf_layout import Layouts
from keras_peft.hf_layout import Part
from keras_peft.hf_layout import Ported
from keras_peft.hf_layout import record
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of

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

# The output of a language model, which may be tied to its embedding.
OUTPUT = "lm_head"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of a layer, and the HF entry of each of its entries."""

    path: str
    variable: keras.Variable
    entries: np.ndarray


class Names:
    """The Hugging Face names of a model's layers.

    A *module* here is a HF module as the backbone's own class has it, without
    what a class with a head puts before it.

    Attributes:
        family: Name of keras-hub's converter, `"bert"`.
        prefix: What a HF class with a head puts before the modules.
        wrapped: Whether the HF class for the model has a head.
        task: PEFT's `task_type`, or `None` where it has none.
        heads: `{path: module}` of a classifier's head.
    """

    def __init__(self, model: keras.Layer):
        self.model = model
        self.layers = layer_tree.layers_by_path(model)
        self.backbone = _backbone_of(model, self.layers)
        converter = _converter_of(self.backbone)
        self.family = converter.__name__.rpartition(".convert_")[2]
        named = self.family in _NAMED_AFTER_FAMILY
        default = self.family if named else "model"
        self.prefix = _PREFIXES.get(self.family, default)
        self.wrapped, self.task = _task_of(model)
        self.heads = self._find_heads()
        self._layouts = Layouts()
        self._read(converter)

    def _read(self, converter):
        """Fills `{HF tensor: [(path, Ported)]}`, `{path: HF tensor}`."""
        config = _config(self.family, self.backbone)
        ported, self._stopped = record(converter, self.backbone, config)
        for path, module in self.heads.items():
            layer = self.layers[path]
            ported[f"{module}.weight"] = [Ported(layer.kernel, _transpose)]
            if layer.bias is not None:
                ported[f"{module}.bias"] = [Ported(layer.bias, None)]
        owners = {
            id(variable): path
            for path, layer in self.layers.items()
            for variable in layer_tree.own_variables(layer)
        }
        self.tensors: dict[str, list[tuple[str, Ported]]] = {}
        self.kernels: dict[str, str] = {}
        for key, weights in ported.items():
            key = self._bare(key)
            known = [
                (owners[id(each.variable)], each)
                for each in weights
                if id(each.variable) in owners
            ]
            self.tensors[key] = known
            for path, each in known:
                if key.endswith(".weight") and self._is_kernel(
                    path, each.variable
                ):
                    self.kernels[path] = key

    def _is_kernel(self, path, variable):
        layer = self.layers[path]
        return has_kernel(layer) and kernel_of(layer).variable is variable

    def _bare(self, key):
        for prefix in (f"{self.prefix}.", "model."):
            key = key.removeprefix(prefix)
        return key

    def _find_heads(self):
        if not isinstance(self.model, _classifiers()):
            return {}
        paths = {id(layer): path for path, layer in self.layers.items()}
        modules = _HEADS.get(self.family, _HEAD)
        found = {
            paths.get(id(getattr(self.model, attribute, None))): module
            for attribute, module in modules.items()
        }
        found.pop(None, None)
        return found

    # -- From Keras to Hugging Face ------------------------------------------

    @functools.cache  # noqa: B019 - lives as long as the model's names.
    def part(self, path: str) -> Part | str:
        """Where the kernel of a layer lies, or why it is not known."""
        key = self.kernels.get(path)
        if key is None:
            return self._stopped or "keras-hub's converter does not name it"
        sharing = [
            (each, kernel_of(self.layers[p]))
            for p, each in self.tensors[key]
            if self._is_kernel(p, each.variable)
        ]
        paths = [p for p, each in self.tensors[key]]
        module = key.removesuffix(".weight")
        part = self._layouts.part(module, sharing, paths.index(path))
        return part or f"it is no block of rows and columns of `{key}`"

    def live(self, module: str) -> str:
        """A module as the HF class that matches the model calls it."""
        module = self.renamed(module)
        outside = module in self.heads.values() or module == OUTPUT
        if outside or not self.wrapped:
            return module
        return f"{self.prefix}.{module}"

    def renamed(self, module: str) -> str:
        """A module as transformers 5 calls it."""
        for old, new in _RENAMED.get(self.family, ()):
            module = module.replace(old, new)
        return module

    # -- From Hugging Face to Keras ------------------------------------------

    @functools.cached_property
    def paths(self) -> dict[str, list[str]]:
        """`{module: [path, ...]}` of all layers with a kernel."""
        found: dict[str, list[str]] = {}
        for path, key in self.kernels.items():
            found.setdefault(key.removesuffix(".weight"), []).append(path)
        return found

    def find(self, name: str) -> str | None:
        """The module that a PEFT folder calls `name`, or `None`.

        Which class was wrapped, and which transformers did it, decide what
        stands before a module and whether it bears its older name.
        """
        words = name.split(".")
        for start in range(len(words)):
            module = self._by_any_name.get(".".join(words[start:]))
            if module and self._allowed(words[:start]):
                return module
        return None

    @functools.cached_property
    def _by_any_name(self):
        modules = [key.rpartition(".")[0] for key in self.tensors]
        older = {module: module for module in modules}
        return {self.renamed(module): module for module in modules} | older

    def _allowed(self, words):
        return {*words} <= {self.prefix, "model", "language_model"}

    @functools.cached_property
    def tied(self) -> str | None:
        """The module of an embedding that is a language model's output too."""
        if self.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            return None
        for path, key in self.kernels.items():
            layer = self.layers[path]
            if (
                isinstance(layer, keras.layers.ReversibleEmbedding)
                and layer.tie_weights
            ):
                return key.removesuffix(".weight")
        return None

    def weights(self, tensor: str, shape: tuple[int, ...]) -> list[Weight]:
        """What a HF tensor of that shape is made of; empty if that is unknown.

        Of tensors that are copies of another, such as a classifier's head.
        """
        ported = self.tensors.get(tensor, [])
        found = self._layouts.entries([each for _, each in ported], shape)
        if not ported or found is None:
            return []
        return [
            Weight(path, each.variable, entries)
            for (path, each), entries in zip(ported, found, strict=True)
        ]

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """Shape of a HF tensor, if it is known."""
        ported = self.tensors[tensor]
        for path, _ in ported:
            if self.kernels.get(path) == tensor:
                part = self.part(path)
                return part.shape if isinstance(part, Part) else None
        shape = tuple(ported[0][1].variable.shape)
        total = sum(math.prod(each.variable.shape) for _, each in ported)
        for candidate in (shape, shape[::-1], (total,)):
            if self.weights(tensor, candidate):
                return candidate
        return None


def _transpose(tensor, shape):
    return np.transpose(tensor)


def _classifiers():
    import keras_hub

    return keras_hub.models.TextClassifier, keras_hub.models.ImageClassifier


def _backbone_of(model, layers):
    import keras_hub

    kind = keras_hub.models.Backbone
    found = [la for la in (model, *layers.values()) if isinstance(la, kind)]
    if not found:
        raise ValueError(
            "Hugging Face names are known for the models of keras-hub, but "
            f"`{model.name}` holds no backbone of it. Use `format='keras'`. "
            f"Received: {type(model).__name__}"
        )
    return found[0]


def _converter_of(backbone) -> ModuleType:
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


def _task_of(model):
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


def _config(family, backbone) -> dict[str, Any]:
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
