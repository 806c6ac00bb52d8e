"""What the codecs of single methods share: a reader and a writer."""

import collections
import dataclasses
import re
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_peft import peft_files
from keras_peft.hf_layout import Part
from keras_peft.hf_names import Names
from keras_peft.kernels import ConvKernel
from keras_peft.kernels import EmbeddingKernel
from keras_peft.kernels import kernel_of
from keras_peft.methods.method import Method

Root = Callable[[float], float] | None

# Settings of most methods that a reader follows, or that only say how PEFT
# chose the modules whose tensors are there.
COMMON = (
    *("target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out"),
)


@dataclasses.dataclass
class Reader:
    """What a codec reads from, and where it says what is wrong.

    Attributes:
        config: The settings in the folder.
        names: The HF names of the model.
        modules: `{module: {suffix: array}}` of the adapter's own tensors.
        shared: `{key: array}` of those that belong to no module.
        wrong: What speaks against the folder.
    """

    config: dict[str, Any]
    names: Names
    modules: dict[str, dict[str, np.ndarray]]
    shared: dict[str, np.ndarray]
    wrong: list[str]

    def parts(self, module: str) -> dict[str, Part]:
        """`{path: Part}` of a module's layers; notes those without a place."""
        found = {}
        for path in self.names.paths.get(module, ()):
            part = self.names.part(path)
            if isinstance(part, Part):
                found[path] = part
            else:
                self.wrong.append(
                    f"`{path}` has no place in `{module}`: {part}"
                )
        return found

    def whole_part(self, module: str) -> tuple[str, Part] | None:
        """The layer that is a module, entry by entry; notes if none is."""
        parts = self.parts(module)
        for path, part in parts.items():
            if len(parts) == 1 and is_whole(part):
                return path, part
        self.wrong.append(
            f"`{module}` is laid out differently here, which "
            f"{self.config['peft_type']} cannot follow"
        )
        return None

    def take(self, module: str, suffix: str, shape: tuple) -> np.ndarray | None:
        """A tensor that must have `shape`; notes what is wrong with it."""
        value = self.modules[module].get(suffix)
        return self._checked(f"{module}.{suffix}", value, shape)

    def take_shared(self, key: str, shape: tuple) -> np.ndarray | None:
        """The same of a tensor that belongs to no module."""
        return self._checked(key, self.shared.get(key), shape)

    def _checked(self, name, value, shape):
        if value is None:
            self.wrong.append(f"missing `{name}`")
        elif value.shape != shape:
            turned = value.ndim == 2 and value.shape == shape[::-1]
            self.wrong.append(
                f"`{name}` has shape {value.shape}, not {shape}"
                + (": it is transposed" if turned else "")
            )
        elif not np.isfinite(value).all():
            self.wrong.append(f"`{name}` holds NaN or infinity")
        else:
            return value
        return None

    def by_pattern(self, patterns: str, module: str, default: str) -> Any:
        """A number that is set for one module, such as its rank."""
        value = peft_files.by_pattern(
            self.config.get(patterns),
            self.names.renamed(module),
            self.config.get(default, 8),
        )
        if isinstance(value, int | float) and value > 0:
            return value
        self.wrong.append(f"`{default}` of `{module}` is {value!r}")
        return 1


@dataclasses.dataclass
class Writer:
    """What a codec writes from, and where it says what cannot be written.

    Attributes:
        method: Settings of the adapter.
        names: The HF names of the model.
        leaves: `{path: adapter}`.
        modules: `{module: {path: Part}}` of all layers of the modules of
            which a layer is adapted.
        shared: To be filled with tensors that belong to no module.
        wrong: What speaks against writing it.
    """

    method: Method
    names: Names
    leaves: dict[str, Any]
    modules: dict[str, dict[str, Part]]
    shared: dict[str, np.ndarray]
    wrong: list[str]

    def whole_parts(self, plain: bool = True) -> Iterable[tuple]:
        """`(module, path, part)` of modules that are one layer, entry by entry.

        Notes all others; `plain` leaves out HF's `Conv1D` too, which PEFT
        adapts by a few methods only.
        """
        for module, parts in self.modules.items():
            (path, part), *others = parts.items()
            if others or not is_whole(part) or (plain and part.transposed):
                self.wrong.append(
                    f"`{path}` is part of `{module}` or laid out differently "
                    f"there, which {type(self.method).__name__} cannot follow"
                )
            else:
                yield module, path, part

    def weights(self, path: str) -> dict[str, np.ndarray]:
        """`{weight: array}` of the adapter at one layer."""
        parameters = self.leaves[path].parameters
        return {k: ops.convert_to_numpy(v) for k, v in parameters.items()}


def is_whole(part: Part) -> bool:
    """Whether a layer has all of a module, its entries in the same order."""
    inputs, outputs = part.sizes
    return np.array_equal(part.inputs, np.arange(inputs)) and np.array_equal(
        part.outputs, np.arange(outputs)
    )


def is_embedding(layer: keras.Layer) -> bool:
    """Whether the kernel of a layer is looked up by row."""
    return isinstance(kernel_of(layer), EmbeddingKernel)


def is_convolution(layer: keras.Layer) -> bool:
    """Whether the kernel of a layer slides over its inputs."""
    return isinstance(kernel_of(layer), ConvKernel)


def commonest(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`(the value that most keys have, {key: value} of the others)`."""
    common = collections.Counter(values.values()).most_common(1)[0][0]
    return common, {k: v for k, v in values.items() if v != common}


def ranked(
    ranks: dict[str, int], scales: dict[str, float], root: Root = None
) -> dict[str, Any]:
    """`rank`, `alpha` and their patterns, so that each path has its own.

    The scale is `alpha / rank`, or `alpha / root(rank)`.
    """
    alphas = {
        path: round(scales[path] * (root(rank) if root else rank), 10)
        for path, rank in ranks.items()
    }
    rank, rank_pattern = commonest(ranks)
    alpha, alpha_pattern = commonest(alphas)
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": _escaped(rank_pattern),
        "alpha_pattern": _escaped(alpha_pattern),
    }


def _escaped(patterns):
    return {re.escape(path): v for path, v in patterns.items()} or None


def ranked_settings(
    names: Names,
    ranks: dict[str, int],
    scales: dict[str, float],
    root: Root = None,
) -> dict[str, Any]:
    """The same as PEFT's settings, by module; without the name of `alpha`."""
    named = {module: names.renamed(module) for module in ranks}
    ranks = {named[module]: rank for module, rank in ranks.items()}
    alphas = {
        named[module]: scale * (root or float)(ranks[named[module]])
        for module, scale in scales.items()
    }
    rank, rank_pattern = commonest(ranks)
    alpha, alpha_pattern = commonest(alphas)
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def targets(names: Names, modules: Iterable[str]) -> list[str]:
    """`target_modules`: last names where they say it all, or whole ones."""
    modules = set(modules)
    everywhere: dict[str, set] = {}
    for module in (*names.paths, *names.heads.values()):
        last = names.renamed(module).rpartition(".")[2]
        everywhere.setdefault(last, set()).add(module)
    found = set()
    for module in modules:
        last = names.renamed(module).rpartition(".")[2]
        alone = everywhere.get(last, {module}) <= modules
        found.add(last if alone else names.live(module))
    return sorted(found)
