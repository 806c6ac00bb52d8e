"""Keras model on the TensorFlow backend -> LiteRT file in float32."""

import re
import tempfile
from collections.abc import Collection
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import keras

from keras_peft.export import patches
from keras_peft.export.litert import decoder
from keras_peft.export.signature import ModelInput
from keras_peft.export.signature import Signature

# The only signature of a file, which runtimes look for by this name.
SIGNATURE = "serving_default"
# The stem of a file that is to have a cache.
DECODER = "decoder"


def trace(
    model: keras.Model,
    signature: Signature,
    path: Path,
    but: Collection[ModuleType] = (),
    source: str = "tensorflow",
) -> None:
    """Writes the file that computes what a call of `model` does.

    A file called `decoder` gets a signature for a prompt, and one for each
    token after it. Inputs are called `input_<position>`, and outputs
    `output_<position>`. `but` names patches that stay away, and `source` the
    backend that the model comes from.
    """
    names = [i.name for i in signature.inputs]

    def flat(*tensors: Any) -> list[Any]:
        named = dict(zip(names, tensors, strict=True))
        return keras.tree.flatten(signature.call(model, named))

    with patches.applied("litert", but, source):
        functions = {SIGNATURE: (flat, signature.inputs)}
        if path.stem == DECODER:
            functions = decoder.functions(model)
        path.write_bytes(_convert(model, functions))


def _convert(
    model: keras.Model, functions: Mapping[str, tuple[Any, Any]]
) -> bytes:
    """One file with a signature for every `(function, inputs)`.

    Only operators that every LiteRT runtime has are let in.
    """
    import tensorflow as tf
    from tensorflow.lite.python.convert_phase import ConverterError

    module = tf.Module()
    # Variables that the module does not hold would come out empty.
    module.variables_of_model = [v.value for v in model.variables]
    signatures = {
        name: _function(function, inputs)
        for name, (function, inputs) in functions.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures=signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=list(functions)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            return converter.convert()
        except ConverterError as error:
            lacking = _lacking(str(error))
            if not lacking:
                raise
            raise ValueError(
                "LiteRT has no operator for a part of the model. Export to "
                "ONNX, or write that part in other operators. Received: "
                + ", ".join(lacking)
            ) from error


def _lacking(message: str) -> list[str]:
    """Operators that the converter did not know, and where they are."""
    found = re.findall(
        r"fused\[\"(\w+):\", \"([^@\"]*)@[^\n]*'tf\.\w+' op is neither", message
    )
    return sorted({f"tf.{kind} in {place}" for kind, place in found})


def _function(function: Any, inputs: tuple[ModelInput, ...]) -> Any:
    import tensorflow as tf

    specs = [
        tf.TensorSpec(
            [None if isinstance(size, str) else size for size in i.shape],
            i.dtype,
            name=f"input_{position}",
        )
        for position, i in enumerate(inputs)
    ]

    def numbered(*tensors: Any) -> dict[str, Any]:
        # An output that is an input, or given twice, needs a tensor of its own.
        return {
            f"output_{position}": tf.identity(output)
            for position, output in enumerate(function(*tensors))
        }

    return tf.function(numbered, input_signature=specs, autograph=False)
