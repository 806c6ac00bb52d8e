"""What the outputs of a model are called in a file."""

from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

import keras


def output_names(
    model: keras.Model, outputs: Any, inputs: Collection[str] = ()
) -> list[str]:
    """Names for the outputs of one call, in `keras.tree.flatten`'s order.

    Keys of dictionaries, else the name a user gave the output layer, else
    `output`, numbered where there are several. A name of one of `inputs`, such
    as `masks`, becomes `output_masks`.
    """
    if isinstance(outputs, dict):
        names = [_path_name(path) for path, _ in _flat_with_path(outputs)]
    else:
        count = len(keras.tree.flatten(outputs))
        names = _layer_names(model)
        if len(names) != count or any(map(_is_automatic, names)):
            names = ["output"] if count == 1 else []
            names = names or [f"output_{n}" for n in range(count)]
    taken = set(inputs)
    return _unique([f"output_{n}" if n in taken else n for n in names])


def _layer_names(model: keras.Model) -> list[str]:
    """Names of a functional model's output layers.

    A language model's last layer is its embedding, used backwards.
    """
    names = getattr(model, "output_names", None) or []
    tables = {
        layer.name for layer in model.layers if hasattr(layer, "input_dim")
    }
    return ["logits" if name in tables else name for name in names]


def _flat_with_path(nest: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return keras.tree.flatten_with_path(nest)


def _path_name(path: tuple[Any, ...]) -> str:
    return "_".join(map(str, path))


def _is_automatic(name: str) -> bool:
    """Whether Keras made the name up from a class, as in `dense_3`."""
    stem = name.rstrip("0123456789").rstrip("_")
    classes = (*vars(keras.layers), *vars(keras))
    return stem in {keras.src.utils.naming.to_snake_case(c) for c in classes}


def _unique(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        unique.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return unique
