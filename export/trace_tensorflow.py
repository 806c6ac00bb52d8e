"""Keras model on the TensorFlow backend -> ONNX, with tf2onnx."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_peft.export.signature import Signature

OPSET = 18


def trace(model: keras.Model, signature: Signature, path: Path) -> None:
    """Writes the graph of `model` to `path`."""
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
    with _without_xla():
        concrete = function.get_concrete_function()
    proto, _ = tf2onnx.convert.from_function(
        function,
        input_signature=specs,
        opset=OPSET,
        custom_op_handlers={"Erfc": (_erfc, [])},
    )
    _constants_from_captures(proto, concrete)
    onnx.save(
        proto,
        str(path),
        save_as_external_data=True,
        location=path.name + ".data",
    )


def _erfc(context: Any, node: Any, name: str, args: Any) -> None:
    """`Erfc(x)` as `1 - Erf(x)`.

    TensorFlow writes the exact GELU with it; tf2onnx would pass the unknown
    operator through and the file would not load.
    """
    x = node.input[0]
    output = node.output[0]
    dtype = context.get_dtype(output)
    shape = context.get_shape(output)
    context.remove_node(node.name)
    erf = context.make_node("Erf", [x], dtypes=[dtype], shapes=[shape])
    one = context.make_const(f"{node.name}_one", np.array(1, "float32"))
    context.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=[output],
        name=f"{node.name}_sub",
        dtypes=[dtype],
        shapes=[shape],
    )


@contextlib.contextmanager
def _without_xla() -> Iterator[None]:
    """Traces grouped convolutions in the open.

    Keras compiles them with `jit_compile=True`, a call that tf2onnx cannot
    look into.
    """
    import tensorflow as tf

    real = tf.function

    def traceable(function: Any = None, **options: Any) -> Any:
        if options.get("jit_compile"):
            return (lambda f: f) if function is None else function
        return real(function, **options) if function else real(**options)

    tf.function = traceable
    try:
        yield
    finally:
        tf.function = real


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
