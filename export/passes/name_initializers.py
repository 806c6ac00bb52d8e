"""Initializers called by the path of the Keras variable they hold."""

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from keras_peft.export.passes import rewriting

# What operators call an input that may be anything.
_VAGUE = ("data", "input", "inputs")


def apply(model: ir.Model, variables: Mapping[str, np.ndarray]) -> int:
    """Renames every initializer; counts those that hold a variable.

    Tracers number their constants. Values are compared by content, in the
    variable's order and transposed as convolutions and tied outputs are. Any
    other is called what its reader calls it, as `axes` or `shape`, or
    `constant` where that has no name.

    Args:
        model: A traced graph.
        variables: Values of the model's variables by path.
    """
    paths: dict[str | None, str] = {}
    for known, variable in variables.items():
        for stored in _layouts(variable):
            paths.setdefault(_digest(stored), known)
    paths.pop(None, None)
    found = {
        value: path
        for value in model.graph.initializers.values()
        if (path := paths.get(_digest(rewriting.array(value)))) is not None
    }
    others = [v for v in model.graph.initializers.values() if v not in found]
    taken = {v.name for v in model.graph.inputs}
    taken.update(v.name for node in model.graph for v in node.outputs)
    for number, value in enumerate(found | dict.fromkeys(others)):
        # No name that another one still has.
        value.name = f"initializer {number}"
    for value, path in found.items():
        _rename(value, path, taken)
    for value in others:
        _rename(value, _role(value), taken)
    return len(found)


def _role(value: ir.Value) -> str:
    for node, position in value.uses():
        formal = onnx.defs.get_schema(node.op_type, domain=node.domain).inputs
        name = formal[min(position, len(formal) - 1)].name.lower()
        if len(name) > 1 and name not in _VAGUE:
            return name
    return "constant"


def _layouts(value: np.ndarray) -> list[np.ndarray]:
    layouts = [value]
    if value.ndim == 2:
        layouts.append(value.T)
    if value.ndim >= 3:
        outer = (value.ndim - 1, value.ndim - 2)
        layouts.append(value.transpose(*outer, *range(value.ndim - 2)))
    return layouts


def _digest(value: np.ndarray | None) -> str | None:
    """What equal weights share; `None` for what holds no weights."""
    if value is None or value.size < 2 or value.dtype.kind != "f":
        return None
    content = np.ascontiguousarray(value, "float32").tobytes()
    return hashlib.sha256(content).hexdigest()


def _rename(initializer: ir.Value, path: str, taken: set[str]) -> None:
    name, number = path, 1
    while name in taken:
        number += 1
        name = f"{path}_{number}"
    taken.add(name)
    initializer.name = name
