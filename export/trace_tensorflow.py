"""Keras model on the TensorFlow backend -> ONNX, with tf2onnx."""

from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import keras

from keras_peft.export import patches
from keras_peft.export.signature import Signature

OPSET = 18


def trace(
    model: keras.Model,
    signature: Signature,
    path: Path,
    but: Collection[ModuleType] = (),
    source: str = "tensorflow",
) -> None:
    """Writes the graph of `model` to `path`.

    `but` names patches that stay away, and `source` the backend that the model
    comes from.
    """
    import onnx
    import tensorflow as tf
    import tf2onnx
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    patch_tf2onnx()
    specs = [
        tf.TensorSpec(
            [None if isinstance(size, str) else size for size in i.shape],
            i.dtype,
            name=f"input_{position}",
        )
        for position, i in enumerate(signature.inputs)
    ]
    names = [i.name for i in signature.inputs]

    def flat(*tensors: Any) -> tuple[Any, ...]:
        named = dict(zip(names, tensors, strict=True))
        outputs = keras.tree.flatten(signature.call(model, named))
        return tuple(tf.identity(output) for output in outputs)

    function = tf.function(flat, input_signature=specs, autograph=False)
    with patches.applied("tensorflow", but, source):
        concrete = function.get_concrete_function()
        proto, _ = tf2onnx.convert.from_function(
            function,
            input_signature=specs,
            opset=OPSET,
            custom_op_handlers=patches.operators(but),
        )
    _constants_from_captures(proto, concrete)
    onnx.save(
        proto,
        str(path),
        save_as_external_data=True,
        location=path.name + ".data",
    )


def _constants_from_captures(proto: Any, concrete: Any) -> None:
    """Eager tensors captured while tracing become initializers.

    Gemma's embedding scale is one; tf2onnx would list it as an input that
    the user has to feed.
    """
    import tensorflow as tf
    from onnx import numpy_helper

    captured = {
        placeholder.name.split(":")[0]: value
        for value, placeholder in concrete.graph.captures
        if value.dtype != tf.resource
    }
    graph = proto.graph
    for value in list(graph.input):
        name = value.name.split(":")[0]
        if name in captured:
            array = captured[name].numpy()
            graph.initializer.append(numpy_helper.from_array(array, value.name))
            graph.input.remove(value)
