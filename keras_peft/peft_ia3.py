"""IA3 in PEFT's files: one scale per output, or per input of a module."""

import re

import numpy as np

from keras_peft import peft_files
from keras_peft.methods.ia3 import IA3
from keras_peft.peft_codec import COMMON
from keras_peft.peft_codec import is_convolution
from keras_peft.peft_codec import is_embedding
from keras_peft.peft_codec import targets

PEFT_TYPE = "IA3"
METHOD = IA3
SUFFIXES = ("ia3_l",)
SHARED = ()
KNOWN = (*COMMON, "feedforward_modules", "init_ia3_weights")


def read(reader):
    """`(method, {path: {weight: array}})`; notes what is wrong."""
    feedforward, adapters = [], {}
    for module in reader.modules:
        parts = reader.parts(module)
        if not parts:
            continue
        inputs, outputs = next(iter(parts.values())).sizes
        inward = peft_files.matches(
            reader.config.get("feedforward_modules"),
            reader.names.renamed(module),
        )
        shape = (1, inputs) if inward else (outputs, 1)
        scale = reader.take(module, "ia3_l", shape)
        for path, part in parts.items():
            if scale is not None:
                places = part.inputs if inward else part.outputs
                adapters[path] = {"ia3_scale": scale.ravel()[places]}
            if inward:
                feedforward.append(re.escape(path))
    return None if reader.wrong else (IA3(feedforward), adapters)


def write(writer):
    """`(settings, {module: {suffix: array}})`; notes what cannot be said."""
    modules, inward = {}, set()
    for module, parts in writer.modules.items():
        layer = writer.names.layers[next(iter(parts))]
        if is_embedding(layer) or is_convolution(layer):
            writer.wrong.append(f"`{module}` is no linear module")
            continue
        into = {writer.method.scales_inputs(path) for path in parts}
        if into == {True}:
            inward.add(module)
        modules[module] = {"ia3_l": _scale(writer, module, parts, into)}
    if writer.wrong:
        return None
    feedforward = targets(writer.names, inward)
    others = targets(writer.names, modules.keys() - inward)
    settings = {
        "target_modules": [*feedforward, *others],
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(
            part.transposed
            for parts in writer.modules.values()
            for part in parts.values()
        ),
    }
    return settings, modules


def _scale(writer, module, parts, into):
    inputs, outputs = next(iter(parts.values())).sizes
    scales = {
        path: writer.weights(path)["ia3_scale"] if path in writer.leaves else 1
        for path in parts
    }
    if into == {False}:
        whole = np.ones((outputs, 1), "float32")
        for path, part in parts.items():
            whole[part.outputs, 0] = scales[path]
        return whole
    whole = np.ones((1, inputs), "float32")
    for path, part in parts.items():
        whole[0, part.inputs] = scales[path]
    if into != {True} or any(
        not np.array_equal(whole[0, part.inputs] * np.ones(1), scales[path])
        for path, part in parts.items()
    ):
        writer.wrong.append(
            f"the layers of `{module}` scale its inputs differently"
        )
    return whole
