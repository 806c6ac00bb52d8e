"""The Hugging Face names of a model's layers and weights."""

import dataclasses
import functools
import math
from types import ModuleType

import keras
import numpy as np

from keras_peft import layer_tree
from keras_peft.hf_families import backbone_of
from keras_peft.hf_families import config_for
from keras_peft.hf_families import converter_of
from keras_peft.hf_families import head_modules
from keras_peft.hf_families import prefix_of
from keras_peft.hf_families import renamed
from keras_peft.hf_families import task_of
from keras_peft.hf_layout import Layouts
from keras_peft.hf_layout import Part
from keras_peft.hf_layout import Ported
from keras_peft.hf_layout import record
from keras_peft.kernels import has_kernel
from keras_peft.kernels import kernel_of

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
        self.backbone = backbone_of(model, self.layers.values())
        converter = converter_of(self.backbone)
        self.family = converter.__name__.rpartition(".convert_")[2]
        self.prefix = prefix_of(self.family)
        self.wrapped, self.task = task_of(model)
        heads = head_modules(model, self.family)
        self.heads = {
            path: heads[id(layer)]
            for path, layer in self.layers.items()
            if id(layer) in heads
        }
        self._layouts = Layouts()
        self._parts: dict[str, Part | str] = {}
        self._read(converter)

    def _read(self, converter: ModuleType) -> None:
        """Fills `{HF tensor: [(path, Ported)]}`, `{path: HF tensor}`."""
        config = config_for(self.family, self.backbone)
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

    # -- From Keras to Hugging Face ------------------------------------------

    def part(self, path: str) -> Part | str:
        """Where the kernel of a layer lies, or why it is not known."""
        if path not in self._parts:
            self._parts[path] = self._find_part(path)
        return self._parts[path]

    def _find_part(self, path):
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
        return renamed(self.family, module)

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
