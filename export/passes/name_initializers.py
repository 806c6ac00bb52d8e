"""Initializers called by the path of the Keras variable they hold."""

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import rewriting


def apply(model: ir.Model, variables: Mapping[str, np.ndarray]) -> int:
    """Renames the initializers that hold a variable; counts them.

    Tracers number their constants. Values are compared by content, in the
    variable's order and transposed as convolutions and tied outputs are.
    Values a tracer computed, such as a folded normalization, keep a number.

    Args:
        model: A traced graph.
        variables: Values of the model's variables by path.
    """
    paths: dict[str, str] = {}
    for path, value in variables.items():
        for stored in _layouts(value):
            paths.setdefault(_digest(stored), path)
    taken = set(model.graph.initializers)
    count = 0
    for initializer in list(model.graph.initializers.values()):
        content = rewriting.array(initializer)
        if content is None or content.size < 2 or content.dtype.kind != "f":
            continue
        digest = _digest(content)
        if digest in paths:
            _rename(initializer, paths[digest], taken)
            count += 1
    return count


def _layouts(value: np.ndarray) -> list[np.ndarray]:
    layouts = [value]
    if value.ndim == 2:
        layouts.append(value.T)
    if value.ndim >= 3:
        outer = (value.ndim - 1, value.ndim - 2)
        layouts.append(value.transpose(*outer, *range(value.ndim - 2)))
    return layouts


def _digest(value: np.ndarray) -> str:
    content = np.ascontiguousarray(value, "float32").tobytes()
    return hashlib.sha256(content).hexdigest()


def _rename(initializer: ir.Value, path: str, taken: set[str]) -> None:
    name, number = path, 1
    while name in taken:
        number += 1
        name = f"{path}_{number}"
    taken.add(name)
    initializer.name = name
