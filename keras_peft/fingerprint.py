"""Telling one base model from another by a few of its numbers."""

import re
from collections.abc import Sequence

import keras
import numpy as np

from keras_peft import layer_tree
from keras_peft.packed_kernel import PackedKernel
from keras_peft.packed_kernel import samples
from keras_peft.patterns import lies_in


def fingerprint(
    model: keras.Layer, head: Sequence[str] | None = None
) -> dict[str, dict]:
    """`{"path.weight": {"shape", "dtype", "samples"}}` of the base.

    Of a kernel in 4 or 8 bits also its "format".
    """
    return {
        key: _entry(variable)
        for key, variable in _base_variables(model, head).items()
    }


def formats_of(saved: dict[str, dict]) -> dict[str, str]:
    """`{path: format}` of the layers of a base that were in 4 or 8 bits."""
    return {
        key.rpartition(".")[0]: entry["format"]
        for key, entry in saved.items()
        if "format" in entry
    }


def compare(
    model: keras.Layer, saved: dict[str, dict], head: Sequence[str]
) -> list[str]:
    """What tells the base of `model` from the one that was `saved`."""
    return differences(saved, fingerprint(model, head))


def differences(saved: dict[str, dict], current: dict[str, dict]) -> list[str]:
    """What tells the `current` base from the one that was `saved`.

    Numbers may differ by as much as the coarser of the two dtypes rounds, so
    that an adapter trained over bfloat16 fits the same weights in float32.
    """
    wrong = [f"its base has no `{key}`" for key in saved if key not in current]
    wrong += [
        f"its base has `{key}` too" for key in current if key not in saved
    ]
    differ = [
        key
        for key in saved
        if key in current and not _equal(saved[key], current[key])
    ]
    if differ:
        wrong.append(
            f"{len(differ)} of {len(saved)} base weights have other values or "
            f"shapes, `{differ[0]}` first"
        )
    return wrong


def _equal(saved, current):
    if saved["shape"] != current["shape"]:
        return False
    a, b = np.array(saved["samples"]), np.array(current["samples"])
    if saved["dtype"] == current["dtype"]:
        return np.array_equal(a, b)
    epsilon = max(_epsilon(saved["dtype"]), _epsilon(current["dtype"]))
    # Half precision's smallest steps near zero.
    return np.allclose(a, b, rtol=2 * epsilon, atol=1e-7)


def _epsilon(dtype):
    # Mantissa bits; bfloat16 is no NumPy dtype of its own.
    return {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 2.0**-23)


def _base_variables(model, head):
    if head is None:
        head = model.peft.head
    found = {}
    for path, layer in layer_tree.walk(model):
        if not lies_in(path, head):
            variables = layer_tree.own_variables(layer)
            for name, variable in _stable_names(variables).items():
                found[f"{path}.{name}"] = variable
    return found


def _stable_names(variables):
    """Variables by name, those without one counted within their layer.

    Keras counts them over all layers that were ever made.
    """
    found = {}
    for variable in variables:
        name = variable.name
        if re.fullmatch(r"variable(_\d+)?", name):
            name = f"variable_{len(found)}" if found else "variable"
        found[name] = variable
    return found


def _entry(variable):
    entry = {"shape": list(variable.shape), "dtype": variable.dtype}
    if isinstance(variable, PackedKernel):
        # Of the kernel as it was: a base is the same one in any format.
        return {
            **entry,
            "samples": variable.samples,
            "format": variable.form.name,
        }
    return {**entry, "samples": samples(variable)}
