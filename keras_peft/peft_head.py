"""Layers that trained in full, in PEFT's files: its `modules_to_save`."""

import math

import keras
import numpy as np

from keras_peft import adapter_state
from keras_peft.hf_names import OUTPUT
from keras_peft.peft_codec import Reader
from keras_peft.peft_codec import Writer
from keras_peft.targets import find_head


def read_head(
    reader: Reader, model: keras.Model, rest: dict[str, np.ndarray]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """`(head, {variable: array})` from copies of whole modules.

    `rest` holds the tensors that are no adapter's; those that fit no weight
    are noted. What a file leaves out of a head keeps its base values.
    """
    names, values = reader.names, {}
    adapted = adapter_state.is_adapted(model)
    head = list(model.peft.head) if adapted else find_head(model)
    for name, value in rest.items():
        if ".base_layer." in name:
            _check_base_layer(reader, name, value)
            continue
        module, _, parameter = name.rpartition(".")
        found = names.find(module) or module
        weights = names.weights(f"{found}.{parameter}", value.shape)
        if not weights:
            reader.wrong.append(
                f"`{name}` of shape {value.shape} fits no weight of the model"
            )
        for weight in weights:
            values[id(weight.variable)] = value.ravel()[weight.entries]
            if weight.path not in head:
                head.append(weight.path)
    variables = adapter_state.variables_below(names.layers, head)
    base = adapter_state.head_values(model, None) if adapted else {}
    return head, {
        key: values[id(variable)]
        if id(variable) in values
        else base.get(key, _numpy(variable))
        for key, variable in variables.items()
    }


def _check_base_layer(reader, name, value):
    """PEFT saves the base of an adapted embedding; it must be ours."""
    module, _, parameter = name.replace(".base_layer", "").rpartition(".")
    module = reader.names.find(module) or module
    if module == OUTPUT and reader.names.tied:
        module = reader.names.tied
    for weight in reader.names.weights(f"{module}.{parameter}", value.shape):
        ours, theirs = _numpy(weight.variable), value.ravel()[weight.entries]
        # Eight bits are what bfloat16 keeps.
        if np.allclose(ours, theirs, rtol=2.0**-7, atol=1e-6):
            return
    reader.wrong.append(
        f"`{name}` is no weight of this base: it was resized or trained"
    )


def _numpy(variable):
    return keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))


def write_head(
    writer: Writer, model: keras.Model, name: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """`(modules to save, {module.parameter: array})`; notes the nameless."""
    names = writer.names
    variables = adapter_state.head_variables(model)
    held = adapter_state.head_values(model, name)
    values = {id(variable): held[key] for key, variable in variables.items()}
    modules, tensors, placed = [], {}, set()
    for key, ported in names.tensors.items():
        mine = {id(each.variable) for _, each in ported} & values.keys()
        shape = names.shape(key) if mine else None
        if shape is None:
            continue
        whole = np.empty(math.prod(shape), "float32")
        for weight in names.weights(key, shape):
            own = values.get(id(weight.variable))
            whole[weight.entries] = (
                _numpy(weight.variable) if own is None else own
            )
        module, _, parameter = key.rpartition(".")
        tensors[f"{names.live(module)}.{parameter}"] = whole.reshape(shape)
        modules.append(names.live(module))
        placed |= mine
    writer.wrong += [
        f"the head's `{key}` has no name there"
        for key, variable in variables.items()
        if id(variable) not in placed
    ]
    return sorted({_whole(module) for module in modules}), tensors


def _whole(module):
    """What PEFT saves: a head of several layers is one module."""
    return "classifier" if module.startswith("classifier.") else module
